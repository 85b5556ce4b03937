"""Which contenders the benchmarks of whole models have."""

import pytest
import torch

from minidiff.bench import image, pipelines, step, train
from minidiff.kernels.dispatch import active_backend


def test_the_contenders_of_a_gpu_are_all_ways_of_diffusers_and_ours(monkeypatch):
    jobs = pipelines.make_model_jobs("cuda", against=True, max_autotune=True)
    assert [name for name in jobs if name.startswith("diffusers")] == [
        "diffusers",
        "diffusers channels-last",
        "diffusers compiled",
        "diffusers max-autotune",
    ]
    assert next(iter(jobs)) == "diffusers" and [name for name, job in jobs.items() if job["untimed"]] == ["minidiff float32"]
    assert not any("diffusers" in name for name in pipelines.make_model_jobs("cuda", against=False))
    assert next(iter(pipelines.make_model_jobs("cpu", against=True))) == "diffusers float32"


def test_on_a_gpu_all_our_kernels_take_part_in_steps_pictures_and_training():
    for make in (pipelines.make_step_jobs, pipelines.make_model_jobs, train.make_train_jobs):
        job = make("cuda", against=False)["minidiff triton"]
        assert (job["library"], job["dtype"], job["untimed"]) == ("minidiff", "bfloat16", False)
        assert "minidiff triton" not in make("cpu", against=False)


@pytest.mark.parametrize("how", ["triton", "eager"])
@pytest.mark.parametrize("bench", [step, image, train], ids=lambda module: module.__name__)
def test_this_contender_runs_and_is_checked_with_our_kernels_and_the_others_are_not(bench, how, monkeypatch, tmp_path):
    backends = []

    def run():
        backends.append(active_backend())
        return torch.zeros(1)

    monkeypatch.setattr(bench, "_minidiff", lambda *_: (run, run) if bench is train else run)
    monkeypatch.setattr(bench.torch, "load", lambda path: {})
    answer = bench.prepare({"library": "minidiff", "device": "cpu", "dtype": "float32", "how": how, "folder": ""})
    answer({"do": "check", "result": str(tmp_path / "result.npy")})
    answer({"do": "time", "repeats": 2})
    assert backends == ["triton" if how == "triton" else "auto"] * 3 and active_backend() == "auto"
