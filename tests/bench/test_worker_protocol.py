"""A contender's own side: its memory at the highest, and what it says of its runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.bench.worker_protocol import PeakMemory, answer_with

MB = 2**20


PEAK = """
import sys
import time
import torch
from minidiff.bench.worker_protocol import PeakMemory, answer_with

converted, result = sys.argv[1] == "True", sys.argv[2]
peak, MB, runs = PeakMemory(torch.device("cpu"), converted), 2**20, []
big = torch.ones(32 * MB)
del big
kept = torch.ones(8 * MB)
peak.reset()

def run():
    x = torch.ones(16 * MB)
    time.sleep(0.2)  # long enough for anonymous memory, which is looked at from time to time, to be seen
    runs.append(x.sum())
    return runs[-1]

told = answer_with(run, peak)({"do": "check", "result": result})
print(told["memory"], told["first_run"], len(runs), kept.numel())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("converted", [False, True])
def test_the_peak_is_that_of_the_check_and_starts_anew_when_it_is_told_to_forget(converted, tmp_path):
    """In a process of its own: in this one memory may come from what other tests have left."""
    command = [sys.executable, "-c", PEAK, str(converted), str(tmp_path / "result.npy")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    memory, first_run, runs, kept = map(float, done.stdout.split())
    # 32 MB that stay and 64 MB of the run, not the 128 MB before; slack for the interpreter's and the allocator's own.
    assert abs(memory - 96 * MB) < 10 * MB and first_run > 0 and runs == 1
    assert np.load(tmp_path / "result.npy") == 16 * MB and kept == 8 * MB


def test_times_are_of_a_repeat_and_a_result_that_changes_is_checked_apart(tmp_path):
    calls = []

    def run():
        calls.append("run")
        return torch.zeros(())

    answer = answer_with(run, PeakMemory(torch.device("meta"), False), check=lambda: torch.ones(()))
    told = answer({"do": "check", "result": str(tmp_path / "result.npy")})
    assert np.load(tmp_path / "result.npy") == 1 and calls == ["run"] * 2 and told["seconds"] > 0 and told["memory"] is None
    assert answer({"do": "time", "repeats": 3})["seconds"] > 0 and len(calls) == 5
