"""`bench attention`: the rounds, what goes on with an earlier run, the table, and the sums of a U-Net step."""

import json

import pytest
import torch

from minidiff.bench import attention as attention_bench
from minidiff.bench.attention import bench_attention, best_backend, case_rows, sum_steps, worst_error
from minidiff.bench.attention_cases import AttentionCase
from minidiff.bench.contender import Contender, Refused

SELF = AttentionCase("sd1 512 self", 16, 16, heads=2, head_dim=8, calls=5, batch=2, dtype="float32")
CROSS = AttentionCase("sd1 512 cross", 16, 8, heads=2, head_dim=8, calls=3, batch=2, dtype="float32")
SECONDS = {"minidiff": 1.0, "flash": 3.0, "math": 9.0}


class Fake(Contender):
    """In place of a process: cudnn refuses, flash dies at cross-attention, the others take known seconds, a tenth more at a cold cache."""

    asked = []

    def __init__(self, module, job):
        self.name, self.revived = job["contender"], 0

    def close(self):
        pass

    def restart_if_dead(self):
        self.revived += 1

    def ask(self, do, case, **request):
        Fake.asked.append((self.name, do, case["where"]))
        if self.name == "cudnn":
            raise Refused("head dim 8 is too small")
        if do == "time":
            if self.name == "flash" and "cross" in case["where"]:
                raise Refused("died with code 1")
            return {"seconds": SECONDS[self.name], "cold": 1.1 * SECONDS[self.name]}
        errors = {"normal": {"out": 3e-4 if self.name == "minidiff" else 1e-4}}
        return {"errors": errors, "scales": {"normal": {"out": 1.0}}, "picks": "self", "bit_equal": True, "memory_forward": 1}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(attention_bench, "Contender", Fake)
    Fake.asked = []


def test_refusals_are_shown_with_their_reasons_and_sums_are_weighted_by_calls(fake, tmp_path):
    contenders = ("minidiff", "flash", "cudnn", "math", "flex")
    lines = "\n".join(bench_attention(tmp_path / "a.json", 2, cases=[SELF, CROSS], contenders=contenders)).splitlines()
    first = next(line for line in lines if line.startswith("| sd1 512 self"))
    assert "(self) | 5 | forward | 1 s | 3 s | refused | 9 s | refused | 3.00 [3.00, 3.00] (flash) | 3.00 !" in first
    cross = next(line for line in lines if line.startswith("| sd1 512 cross"))
    assert "| 1 s | refused | refused | 9 s | refused | 9.00 [9.00, 9.00] (math) |" in cross
    assert "cudnn refused: head dim 8 is too small" in lines and "flash refused: died with code 1" in lines
    assert "flex refused: not tried below 1024 tokens" in lines
    # 5 calls of self-attention against flash, 3 of cross-attention against math
    assert "| sd1 512 float32, self and cross, forward | 8 s | 42 s | 5.25 [5.25, 5.25] |" in lines
    assert "| sd1 512 float32, cross, both, cold | 3.3 s | 29.7 s | 9.00 [9.00, 9.00] |" in lines
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["finished"] and written["results"][str(SELF)]["ways"]["math"]["both"] == [{"seconds": 9.0, "cold": 1.1 * 9.0}] * 2
    assert written["sums"][0]["ratio"]["median"] == 3.0 and written["settings"]["cases"][0]["calls"] == 5


def test_a_run_that_was_stopped_goes_on_at_the_next_shape(fake, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    arguments = {"cases": [SELF, CROSS], "contenders": ("minidiff", "math")}
    whole = attention_bench.measure
    lines = bench_attention(tmp_path / "a.json", 2, **arguments)
    for line in lines:
        if line.startswith("| sd1 512 self"):
            break
    monkeypatch.setattr(attention_bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(lines)
    assert not json.loads((tmp_path / "a.json").read_text())["finished"]

    monkeypatch.setattr(attention_bench, "measure", whole)
    Fake.asked = []
    again = list(bench_attention(tmp_path / "a.json", 2, **arguments))
    assert {where for _, _, where in Fake.asked} == {"sd1 512 cross"}
    assert any("| sd1 512 self" in line for line in again) and json.loads((tmp_path / "a.json").read_text())["finished"]


def test_flex_is_left_out_when_its_compiling_would_take_too_long(fake, monkeypatch):
    large = AttentionCase("sd1 512 self", 2048, 2048, heads=2, head_dim=8, calls=5, batch=2, dtype="float32")
    monkeypatch.setattr(attention_bench, "FLEX_TIME_LIMIT", -1)
    lines = "\n".join(bench_attention(None, 1, cases=[large], contenders=("minidiff", "flex")))
    assert "flex refused: left out of the time that there is" in lines and ("flex", "check", large.where) not in Fake.asked


def way(out, scale=1.0, **more):
    errors, scales = {"normal": {"out": out}, "large mean": {"out": 100 * out}}, {"normal": {"out": scale}, "large mean": {"out": scale}}
    return {"errors": errors, "scales": scales} | more


def test_the_worst_error_is_over_the_best_fused_kernels():
    result = {
        "ways": {
            "minidiff": way(1.5e-3),
            "flash": way(1e-3),
            "cudnn": way(2e-3),
            "math": way(1e-9),
        }
    }
    assert worst_error(SELF, result) == pytest.approx(1.5, rel=1e-3)
    assert worst_error(SELF, {"ways": {"minidiff": way(1e-3), "math": way(1e-9)}}) is None
    # Both exact to the last bit, or nearly: no ratio of rounding errors of rounding errors.
    eps = torch.finfo(torch.float32).eps
    assert worst_error(SELF, {"ways": {"minidiff": way(1e-5 * eps), "flash": way(0.0)}}) == pytest.approx(1.1, rel=1e-6)


def test_the_best_backend_is_that_of_the_least_median_and_differences_between_runs_are_said():
    rounds = {"flash": [1.0, 1.0, 9.0], "math": [2.0, 2.0, 2.0], "minidiff": [0.5, 0.5, 0.5]}
    ways = {name: way(1e-3, forward=[{"seconds": s} for s in values], both=[], bit_equal=False) for name, values in rounds.items()}
    result = {"ways": ways}
    assert best_backend(result, "forward") == "flash" and best_backend(result, "both") is None
    row = next(case_rows(SELF, result, ("minidiff", "flash")))
    assert "2.00 [2.00, 18.00] (flash) | 1.00 differs from run to run !" in row
    assert list(sum_steps([SELF], {str(SELF): result}, "cold")) == []


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValueError, match="contender 'xformers' unknown; choose minidiff, triton, flash"):
        next(bench_attention(contenders=("xformers",)))
    with pytest.raises(ValueError, match="model 'sd3' unknown"):
        next(bench_attention(models=("sd3",)))


def test_a_small_one_runs_in_processes_of_its_own(tmp_path):
    lines = "\n".join(bench_attention(tmp_path / "a.json", 1, cases=[CROSS], contenders=("minidiff", "math"), kinds=("normal",)))
    assert "| sd1 512 cross: 16 x 8, 2 x 8, float32 (pytorch) | 3 | both |" in lines and "refused" not in lines
    ways = json.loads((tmp_path / "a.json").read_text())["results"][str(CROSS)]["ways"]
    assert ways["math"]["errors"]["normal"]["dk"] < 1e-6 and ways["math"]["forward"][0]["seconds"] > 0
