"""One contender of `bench attention`, in this process: errors against what is exact, refusals with their reasons, times."""

from dataclasses import asdict

import pytest
import torch

from minidiff.bench import attention_worker
from minidiff.bench.attention_cases import KINDS, AttentionCase
from minidiff.bench.attention_worker import AttentionWorker, time_eager

CPU = torch.device("cpu")
CASE = AttentionCase("here", 20, 12, heads=2, head_dim=8, calls=1, batch=2, dtype="float32")


@pytest.fixture
def known(tmp_path):
    path = str(tmp_path / "known.pt")
    AttentionWorker("reference", CPU).answer({"do": "make", "case": asdict(CASE), "kinds": list(KINDS), "path": path})
    return path


@pytest.mark.parametrize("name", ["minidiff", "by hand"])
def test_a_contender_tells_its_errors_its_memory_and_its_times(name, known):
    one = AttentionWorker(name, CPU)
    told = one.answer({"do": "check", "case": asdict(CASE), "path": known})
    assert set(told["errors"]) == set(KINDS) and set(told["errors"]["normal"]) == {"out", "dq", "dk", "dv"}
    for kind, errors in told["errors"].items():
        for tensor, error in errors.items():
            assert error < 1e-4 * max(told["scales"][kind][tensor], 0.1), (kind, tensor)  # float32, with exponents up to e^60
    assert told["picks"] == ("pytorch" if name == "minidiff" else None) and told["bit_equal"] is None
    assert told["memory_both"] >= 0
    for direction in ("forward", "both"):
        assert one.answer({"do": "time", "case": asdict(CASE), "direction": direction, "least": 0.0})["seconds"] > 0


def test_a_contender_that_is_wrong_shows_it(known, monkeypatch):
    monkeypatch.setattr(attention_worker, "attention", lambda q, k, v, heads, causal: attention_worker.naive_attention(q, k, v, 1, causal))
    told = AttentionWorker("minidiff", CPU).answer({"do": "check", "case": asdict(CASE), "path": known})
    assert told["errors"]["normal"]["out"] > 0.1 * told["scales"]["normal"]["out"]  # one head in place of two


def test_the_reason_is_what_pytorch_warned_of_rather_than_its_error(known, monkeypatch):
    import warnings

    def refuses(q, k, v, heads, causal):
        warnings.warn("Flash attention kernel not used because: (Triggered internally at file:1.)", stacklevel=1)
        warnings.warn("Flash attention requires head_dim <= 256. Got 512. (Triggered internally at file:2.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention_worker, "attention", refuses)
    with pytest.raises(RuntimeError, match=r"^Flash attention requires head_dim <= 256. Got 512.$"):
        AttentionWorker("minidiff", CPU).answer({"do": "check", "case": asdict(CASE), "path": known})


def test_contenders_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no backend 'overrideable'"):
        attention_worker.way("overrideable")
    causal = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="only tried without a mask"):
        attention_worker.way("flex")(causal, causal, causal, 1, True)


def test_as_many_calls_are_timed_as_take_the_time_that_is_asked_for():
    calls = []
    took = time_eager(lambda: calls.append(torch.ones(1000).sum()), CPU, 0.01)
    assert len(calls) > 3 and 0 < took < 0.01


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_timed_warm_and_cold_and_three_runs_are_equal(known):
    one = AttentionWorker("minidiff", torch.device("cuda"))
    told = one.answer({"do": "check", "case": asdict(CASE), "path": known})
    assert told["bit_equal"] is True and told["memory_both"] > 0
    found = one.answer({"do": "time", "case": asdict(CASE), "direction": "both", "least": 0.0})
    assert all(0 < found[name] < 0.1 for name in ("seconds", "cold", "eager"))
