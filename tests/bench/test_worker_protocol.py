"""A contender's own side: its memory at the highest, and what it says of its runs."""

import sys

import numpy as np
import pytest
import torch

from minidiff.bench.worker_protocol import PeakMemory, answer_with

MB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("converted", [False, True])
def test_the_peak_is_that_of_the_check_and_starts_anew_when_it_is_told_to_forget(converted, tmp_path):
    peak = PeakMemory(torch.device("cpu"), converted)
    big = torch.ones(32 * MB)
    del big
    kept = torch.ones(8 * MB)
    peak.reset()
    runs = []

    def run():
        runs.append(torch.ones(16 * MB).sum())
        return runs[-1]

    told = answer_with(run, peak)({"do": "check", "result": str(tmp_path / "result.npy")})
    # 32 MB that stay and 64 MB of the run, not the 128 MB before; slack for the interpreter's and the allocator's own.
    assert abs(told["memory"] - 96 * MB) < 10 * MB and told["first_run"] > 0 and len(runs) == 1
    assert np.load(tmp_path / "result.npy") == 16 * MB and kept.numel() == 8 * MB


def test_times_are_of_a_repeat_and_a_result_that_changes_is_checked_apart(tmp_path):
    calls = []

    def run():
        calls.append("run")
        return torch.zeros(())

    answer = answer_with(run, PeakMemory(torch.device("meta"), False), check=lambda: torch.ones(()))
    told = answer({"do": "check", "result": str(tmp_path / "result.npy")})
    assert np.load(tmp_path / "result.npy") == 1 and calls == ["run"] * 2 and told["seconds"] > 0 and told["memory"] is None
    assert answer({"do": "time", "repeats": 3})["seconds"] > 0 and len(calls) == 5
