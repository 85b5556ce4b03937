"""The benchmark of loading: its machinery on a very small model, and the judgement on its numbers. Times of small files mean nothing."""

import importlib.util
import json
import sys

import pytest
import torch

from minidiff.bench import load as load_bench
from minidiff.bench.load import (
    CASES,
    FileCase,
    bench_load,
    case_row,
    fill_page_cache,
    find_missed_goals,
    random_model,
    summarize,
    write_case,
)
from minidiff.bench.load_worker import Measurement, ProcessMemory
from tests.small_models import small_config

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MB = 2**20


def measurement(seconds=1.0, resident_peak=100, anonymous_peak=100, import_seconds=1.0) -> Measurement:
    return Measurement(import_seconds, seconds, seconds, resident_peak, resident_peak, anonymous_peak, anonymous_peak, total=5.0, count=25)


SLOW = [
    pytest.param(case, marks=pytest.mark.slow) for case in (FileCase("diffusers folder"), FileCase(".ckpt"))
]  # diffusers takes seconds to import


@pytest.mark.parametrize("case", [FileCase(".safetensors", "float16"), *SLOW], ids=str)
def test_minidiff_and_diffusers_read_the_same_weights_and_every_number_is_kept(case, tmp_path):
    lines = list(bench_load(out=tmp_path / "load.json", rounds=1, config=small_config(), cases=[case]))
    record = json.loads((tmp_path / "load.json").read_text())
    assert sum(line.startswith(f"| {case} |") for line in lines) == 1
    assert "torch" in record["machine"]["versions"] and record["machine"]["processor"] in lines[0] and record["command"]
    (measured,) = record["cases"]
    assert measured["memory_counted"] == ("anonymous" if case.stored == "float16" else "resident")
    runs = [measured["runs"][name][0] for name in ("minidiff", "diffusers")]
    expected = sum(weight.numel() for weight in all_weights(random_model(small_config(), torch.float32)))
    for run in runs:
        assert run["count"] == expected and 4 * expected == measured["model_bytes"]
        assert run["seconds"] > 0 and run["import_seconds"] > 0
        assert run["resident_peak"] >= run["resident"] and run["anonymous_peak"] >= run["anonymous"]


def test_without_diffusers_the_goal_that_needs_it_is_not_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(load_bench, "measure_case", lambda case, config, contenders, rounds: {name: [measurement()] for name in contenders})
    lines = list(bench_load(against=False, cases=[FileCase(".ckpt")]))
    assert lines[-1].strip().startswith("goals met") and "| 1.00 s |  |  |" in lines[-2]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="diffusers is not installed.*--no-against"):
        next(bench_load())


def test_the_median_time_and_the_highest_memory_count():
    found = {
        "minidiff": [measurement(1.0, 90, 10), measurement(9.0, 115, 30), measurement(2.0, 100, 20)],
        "diffusers": [measurement(4.0, 200, 200)] * 3,
    }
    summary = summarize(FileCase(".ckpt"), found)
    assert summary["seconds"] == {"minidiff": 2.0, "diffusers": 4.0} and summary["with_imports"] == {"minidiff": 3.0, "diffusers": 5.0}
    assert summary["memory"] == {"minidiff": 115, "diffusers": 200} and summary["model_bytes"] == 100
    assert find_missed_goals(summary) == []
    assert case_row(FileCase(".ckpt"), summary).split(" | ")[1:7] == ["2.00 s", "4.00 s", "0.50", "3.00 s", "5.00 s", "0.60"]
    assert summarize(FileCase(".ckpt", "float16"), found)["memory"] == {"minidiff": 30, "diffusers": 200}


def test_a_goal_that_is_missed_is_said_with_its_number():
    slow = summarize(FileCase(".ckpt"), {"minidiff": [measurement(3.0, 116)], "diffusers": [measurement(4.0)]})
    assert find_missed_goals(slow) == ["0.75 of diffusers' time, the goal is 0.5", "memory 1.16 of the model's size, the goal is 1.15"]


def test_memory_is_what_comes_on_top_and_its_peak_is_seen():
    kept = torch.ones(8 * MB)  # 32 MB from before, which do not count
    with ProcessMemory() as memory:
        passing = torch.ones(32 * MB)
        memory.done.wait(0.1)  # time for the watcher to look
        del passing
        rest = torch.ones(16 * MB)
    resident_peak, resident, anonymous_peak, anonymous = memory.above()
    # Some MB of slack: the interpreter and the allocator take and give back memory of their own.
    assert abs(anonymous_peak - 128 * MB) < 8 * MB and abs(anonymous - 64 * MB) < 8 * MB
    assert abs(resident_peak - 128 * MB) < 8 * MB and abs(resident - 64 * MB) < 8 * MB
    assert kept.numel() + rest.numel() == 24 * MB


def test_pages_of_a_file_are_resident_but_not_anonymous(tmp_path):
    path = tmp_path / "zeros"
    path.write_bytes(bytes(64 * MB))
    fill_page_cache(path)
    with ProcessMemory() as memory:
        mapped = torch.from_file(str(path), shared=False, size=16 * MB)
        assert mapped.sum() == 0
    resident_peak, _, anonymous_peak, _ = memory.above()
    assert abs(resident_peak - 64 * MB) < 8 * MB and anonymous_peak < 8 * MB


def test_a_ckpt_holds_every_weight_in_full_though_the_pool_is_shared(tmp_path):
    sd = random_model(small_config(), torch.float32)
    size = 4 * sum(weight.numel() for weight in all_weights(sd))
    for case in CASES:
        (tmp_path / str(case)).mkdir()
        path = write_case(sd, case, tmp_path / str(case))
        files = path.rglob("*.safetensors") if path.is_dir() else [path]
        assert size <= sum(file.stat().st_size for file in files) < size + 2 * MB


def test_nonsense_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="rounds 0: give 1 or more"):
        next(bench_load(rounds=0))
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; make it first"):
        next(bench_load(out=tmp_path / "nowhere" / "load.json"))


def test_a_contender_that_fails_is_named_with_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)minidiff could not load absent.ckpt.*no such file"):
        load_bench.run_in_new_process("minidiff", tmp_path / "absent.ckpt", tmp_path, "float32", small_config())


def all_weights(sd):
    return [weight for part in sd.parts.values() for weight in part.parameters()]
