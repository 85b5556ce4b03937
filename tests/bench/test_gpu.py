"""`bench gpu`: its rehearsal on a small model, what the time does not reach, what is missing, and the tables."""

import json
from contextlib import ExitStack

import pytest
import torch

from minidiff.bench import attention, attention_worker, gpu, race
from minidiff.bench.gpu import STAGES, Plan, bench_gpu, main
from minidiff.bench.gpu_report import format_report
from tests.bench.in_process import InProcess
from tests.small_models import small_config

TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["passes"])
def test_one(kind): pass
@pytest.mark.gpu
def test_two(): assert False, "as it should"
def test_that_needs_no_gpu(): assert False
"""
PLAN = Plan("small", small_config(), size=32, steps=1, rounds=1, batch=2, side=64, copied=2**20)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """All contenders in this process, and two tests in place of those that need a GPU."""
    with ExitStack() as forced:
        for module in (attention, race, gpu):
            monkeypatch.setattr(module, "Contender", InProcess)
        monkeypatch.setattr(attention_worker, "FORCED", forced)
        monkeypatch.setattr(InProcess, "asked", [])
        (tmp_path / "test_marked.py").write_text(TESTS)
        monkeypatch.setattr(gpu, "GPU_TESTS", (str(tmp_path / "test_marked.py"),))
        yield tmp_path / "out"


def read(out, name="gpu"):
    return json.loads((out / f"{name}.json").read_text())


def test_the_rehearsal_goes_through_all_stages_and_writes_every_number(here, monkeypatch):
    monkeypatch.setattr(gpu, "is_installed", lambda package: package not in ("diffusers", "peft"))
    lines = "\n".join(bench_gpu(here, minutes=9, device="cpu", plan=PLAN))
    record = read(here)
    stages = record["results"]
    assert list(stages) == list(STAGES) and record["finished"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(STAGES, "done"), lines
    assert stages["ceilings"]["products"] > 0 and stages["ceilings"]["exponentials"] is None
    kernels, whole = stages["kernels"]["checks"], stages["whole model"]["checks"]
    assert len(kernels) == stages["kernels"]["count"] == 3 + 2 and all(check["ok"] for check in kernels.values()), kernels
    assert len(whole) == 6 and all(check.get("ok") for check in whole.values()), whole
    # float32 differs by the order of its sums, channels-last or not; bfloat16 by its 8 bits
    assert whole["U-Net, float32"]["errors"]["out"] < 1e-5 < 1e-3 < whole["U-Net, bfloat16"]["errors"]["out"]
    assert list(stages["gpu tests"]["tests"].values()) == ["passed", "failed"]
    assert any("as it should" in line for line in stages["gpu tests"]["output"])
    cases = read(here, "attention")["results"]
    assert len(cases) == 3 * 2 + 2 and all(
        len(way["forward"]) == 1 for case in cases.values() for way in case["ways"].values() if "refused" not in way
    )
    for stage, prefix in (("step", ""), ("image", ""), ("lora", "lora: ")):
        results = read(here, stage)["results"]
        assert set(results) == {f"{prefix}minidiff float32", f"{prefix}minidiff bfloat16"}
        assert all(len(result["rounds"]) == 1 for result in results.values())
        assert stages[stage]["floor"] > 0 and "diffusers float32" in stages[stage]["left_out"]
    assert len(read(here, "bundled")["results"]["minidiff"]["rounds"]) == 1 and stages["bundled"]["samples"] == 2
    report = (here / "gpu.md").read_text()
    assert report.strip() == format_report(here) and report.strip() in lines
    for said in (
        "| attention | 3 | 3 | 3 |",
        "Tests: 1 passed, 1 failed.",
        "Left out: diffusers float32; diffusers is not installed.",
        "steps/s, 2 samples",
    ):
        assert said in report, said


def test_what_the_time_does_not_reach_is_named_and_what_was_measured_stays(here, monkeypatch):
    class Ended(gpu.Budget):
        """Time for the first stage only."""

        @property
        def left(self):
            return 0.0 if (here / "gpu.json").exists() and "ceilings" in read(here)["results"] else 60.0

    monkeypatch.setattr(gpu, "Budget", Ended)
    lines = list(bench_gpu(here, device="cpu", plan=PLAN))
    stages = read(here)["results"]
    assert stages["ceilings"]["products"] > 0 and InProcess.asked == []
    assert {stages[name]["status"] for name in list(STAGES)[1:]} == {"skipped: the time was over"}
    assert "\nskipped, the time was over: image" in lines and "| image | skipped: the time was over |" in (here / "gpu.md").read_text()


def test_a_stage_that_fails_stops_no_other(here, monkeypatch):
    def fails(run, budget):
        yield "begins"
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu, "STAGES", {"first": (1, fails), "ceilings": STAGES["ceilings"]})
    assert "\nfirst: failed: RuntimeError: CUDA error: an illegal memory access" in list(bench_gpu(here, device="cpu", plan=PLAN))
    assert read(here)["results"]["ceilings"]["status"] == "done"


def test_only_the_contenders_that_were_named_take_part(here, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", {name: STAGES[name] for name in ("attention", "step", "bundled")})
    list(bench_gpu(here, device="cpu", contenders=["math", "minidiff bfloat16"], plan=PLAN))
    assert set(read(here, "step")["results"]) == {"minidiff bfloat16"}
    assert all(set(case["ways"]) == {"math"} for case in read(here, "attention")["results"].values())
    assert read(here)["results"]["bundled"]["status"] == "left out: none of the chosen contenders takes part"


def test_nonsense_is_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, said in (
        ({"minutes": 0.0}, "minutes 0: give more than 0"),
        ({"contenders": ["tensorrt"]}, "contender 'tensorrt' unknown; choose diffusers float32, "),
    ):
        with pytest.raises(ValueError, match=said):
            next(bench_gpu(out, device="cpu", **arguments))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: PyTorch sees no GPU here; --device cpu runs the rehearsal"):
            next(bench_gpu(out))
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(out), "--device", "cpu", "--minutes", "-1"])
    assert ended.value.code == 2 and "minutes -1: give more than 0" in capsys.readouterr().err and not out.exists()
