"""`bench step` on a very small model: both libraries answer the same. Its times mean nothing."""

import json

import numpy as np
import pytest
import torch

from minidiff.bench import pipelines, step
from minidiff.bench.step import bench_step, inputs, prepare
from tests.small_models import small_config


@pytest.fixture(scope="module")
def folder():
    with pipelines.model_folder(small_config()) as folder:
        torch.save(inputs(small_config(), 32), folder / "inputs.pt")
        yield folder


def checked(folder, tmp_path, **job):
    job = {"folder": str(folder), "device": "cpu", "how": "eager", "dtype": "float32", "untimed": False} | job
    answer = prepare(job)
    told = answer({"do": "check", "result": str(tmp_path / "result.npy")})
    assert told["memory"] is None or told["memory"] > 0
    assert answer({"do": "time", "repeats": 1})["seconds"] > 0
    return np.load(tmp_path / "result.npy")


def test_ours_and_theirs_predict_the_same(folder, tmp_path):
    theirs = checked(folder, tmp_path, library="diffusers")
    assert theirs.shape == (1, 4, 8, 8) and theirs.std() > 0.1
    ours = checked(folder, tmp_path, library="minidiff")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # float32 parity of a small U-Net, times 7.5 of guidance


def test_channels_last_and_bfloat16_are_near(folder, tmp_path):
    exact = checked(folder, tmp_path, library="minidiff")
    for job in ({"library": "diffusers", "how": "channels-last"}, {"library": "minidiff"}):
        near = checked(folder, tmp_path, dtype="bfloat16", **job)
        assert 1e-4 < np.abs(near - exact).mean() / np.abs(exact).mean() < 0.2  # 8 bits, through the net and 7.5 of guidance


def test_the_bench_runs_in_processes_of_its_own(tmp_path):
    lines = "\n".join(bench_step(against=False, out=tmp_path / "step.json", rounds=1, model=small_config()))
    assert "One step of 32 x 32 with guidance" in lines and "refused" not in lines
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["finished"] and set(record["results"]) == {"minidiff float32", "minidiff bfloat16"}
    assert all(len(result["rounds"]) == 1 for result in record["results"].values())


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


def test_without_diffusers_the_way_on_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="diffusers is not installed.*--no-against"):
        next(step.bench())
