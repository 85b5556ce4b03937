"""Rounds of contenders, and the table of them."""

import json

import pytest
import torch

from minidiff.bench import race as race_module
from minidiff.bench.budget import Budget
from minidiff.bench.common import BenchRecord
from minidiff.bench.race import RaceRules, format_table, keep_whole_rounds, race, relative_error
from tests.bench.in_process import InProcess

FAKE = "tests.bench.fake_contender"


def job(seconds=1.0, result=(1.0, 1.0), memory=10, dtype="float32", untimed=False, **more):
    return {"seconds": seconds, "result": list(result), "memory": memory, "dtype": dtype, "untimed": untimed} | more


def test_each_is_checked_and_timed_and_one_that_refuses_or_fails_stops_nobody(tmp_path):
    jobs = {
        "theirs": job(2.0, memory=2 * 10**9, result=(1.0, 1.1), dtype="bfloat16", folder=str(tmp_path)),
        "ours": job(0.5, memory=10**9, result=(1.0, 1.02), dtype="bfloat16"),
        "refuses": job(refuses="no such layout"),
        "fails": job(fails=True),
        "exact": job(untimed=True),
    }
    record = BenchRecord(tmp_path / "bench.json", {})
    lines = "\n".join(race(FAKE, jobs, 3, record, part="lora: ")).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert rows["ours"][:5] == ["500 ms", "4.00 [4.00, 4.00]", "1.00 GB", "0.50", "1.4e-02"]
    assert rows["theirs"][:5] == ["2 s", "1.00 [1.00, 1.00]", "2.00 GB", "1.00", "7.1e-02"]
    assert rows["refuses"][0] == "refused: ValueError: no such layout" and "illegal memory access" in rows["fails"][0]
    assert rows["exact"][:2] == ["", ""]
    written = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert written["lora: ours"]["rounds"] == [0.5] * 3 and written["lora: ours"]["job"] == jobs["ours"]
    assert jobs["theirs"] == written["lora: theirs"]["job"] | {"folder": str(tmp_path)} and str(tmp_path) not in str(written)
    assert written["lora: exact"]["rounds"] == [] and written["lora: refuses"]["refused"]


def test_without_the_one_to_compare_with_times_stand_alone():
    results = {"theirs": {"refused": "no room"}, "ours": {"rounds": [1.0, 3.0], "memory": None, "bit_equal": True}}
    theirs, ours = list(format_table(results, "theirs"))[1:]
    assert "refused: no room" in theirs and ours == "| ours | 2 s |  |  |  |  | equal |"


def test_the_error_is_relative_and_other_shapes_are_an_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1 / 5)  # sqrt(1) / sqrt(9 + 16)
    with pytest.raises(ValueError, match="did not do the same"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_a_budget_is_shared_out_and_ends():
    budget = Budget(1000.0)
    assert 499 < budget.part(0.5).left <= 500 and Budget().part(0.5).left == float("inf") and Budget(-1.0).left == 0


def test_without_time_nobody_is_asked_and_whole_rounds_count(monkeypatch, tmp_path):
    monkeypatch.setattr(race_module, "Contender", InProcess)
    monkeypatch.setattr(InProcess, "asked", [])
    lines = list(race(FAKE, {"ours": job()}, 3, BenchRecord(None, {}), budget=Budget(0.0)))
    assert "| ours | refused: no time was left |" in lines[1] and InProcess.asked == []
    rounds = [[1.0, 2.0, 3.0], [1.0, 2.0], [4.0, 5.0, 6.0]]
    keep_whole_rounds(rounds)
    assert rounds == [[1.0, 2.0], [1.0, 2.0], [4.0, 5.0]]


def test_contenders_are_chosen_by_name_with_those_that_errors_are_measured_against():
    jobs = {"theirs": job(), "ours": job(), "exact": job(untimed=True)}
    assert list(RaceRules(("ours",)).choose(jobs)) == ["ours", "exact"] and list(RaceRules().choose(jobs)) == list(jobs)
    with pytest.raises(ValueError, match="contender 'tensorrt' unknown; choose theirs, ours, exact"):
        RaceRules(("tensorrt",)).choose(jobs)
