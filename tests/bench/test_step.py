"""`bench step` on a very small model: both libraries answer the same. Its times mean nothing."""

import json

import numpy as np
import pytest
import torch

from minidiff.bench import pipelines, step
from minidiff.bench.step import WITH, bench_step, format_costs, inputs, prepare, write_random_controlnet
from tests.small_models import small_config, xl_config


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


def test_sdxl_is_told_the_same_by_both(tmp_path):
    with pipelines.model_folder(xl_config()) as folder:
        given = inputs(xl_config(), 32)
        torch.save(given, folder / "inputs.pt")
        theirs, ours = (checked(folder, tmp_path, library=one) for one in ("diffusers", "minidiff"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # as above
        torch.save(given | {"pooled": given["pooled"].flip(0)}, folder / "inputs.pt")
        swapped = checked(folder, tmp_path, library="minidiff")
    assert np.abs(swapped - ours).max() > 1e-2, "the pooled vectors count"


def test_channels_last_and_bfloat16_are_near(folder, tmp_path):
    exact = checked(folder, tmp_path, library="minidiff")
    for job in ({"library": "diffusers", "how": "channels-last"}, {"library": "minidiff"}):
        near = checked(folder, tmp_path, dtype="bfloat16", **job)
        assert 1e-4 < np.abs(near - exact).mean() / np.abs(exact).mean() < 0.2  # 8 bits, through the net and 7.5 of guidance


@pytest.mark.slow  # and OpenVINO is no dependency of the tests
def test_openvino_predicts_the_same_and_in_bfloat16_where_the_processor_has_it(folder, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(step, "T", 3)  # in bfloat16 OpenVINO multiplies the timestep in 16 bits too, of which 501 has none to spare
    theirs = checked(folder, tmp_path, library="diffusers")
    exact = checked(folder, tmp_path, library="openvino")
    np.testing.assert_allclose(exact, theirs, rtol=1e-3, atol=1e-3)  # float32 with fused sums, times 7.5 of guidance
    other, near = (np.abs(checked(folder, tmp_path, library=one, dtype="bfloat16") - theirs).mean() for one in ("diffusers", "openvino"))
    assert 0 < near < 2 * other  # the same 8 bits, rounded at other places
    with pytest.raises(ValueError, match="raced on a U-Net of latent, timestep and context only"):
        checked(folder, tmp_path, library="openvino", controlnet=True)


def test_openvino_and_compiled_diffusers_take_part_in_a_step_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(pipelines, "find_spec", lambda name: True)
    extra = set(pipelines.make_step_jobs("cpu", True)) - set(pipelines.make_model_jobs("cpu", True))
    assert extra == set(pipelines.OF_STEPS) == {"openvino bfloat16", "diffusers compiled bfloat16"}
    monkeypatch.setattr(pipelines, "find_spec", lambda name: None)
    assert "openvino bfloat16" not in pipelines.make_step_jobs("cpu", True)
    assert not extra & {*pipelines.make_step_jobs("cpu", False), *pipelines.make_step_jobs("cuda", True)}


def test_the_bench_runs_in_processes_of_its_own(tmp_path):
    lines = "\n".join(bench_step(against=False, out=tmp_path / "step.json", rounds=1, model=small_config()))
    assert "One step of 32 x 32 with guidance" in lines and "refused" not in lines
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["finished"] and set(record["results"]) == {"minidiff float32", "minidiff bfloat16"}
    assert all(len(result["rounds"]) == 1 for result in record["results"].values())


def test_with_a_controlnet_they_predict_the_same_and_its_cost_is_said(folder, tmp_path):
    plain = checked(folder, tmp_path, library="minidiff")
    write_random_controlnet(small_config(), folder)
    theirs = checked(folder, tmp_path, library="diffusers", controlnet=True)
    ours = checked(folder, tmp_path, library="minidiff", controlnet=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - plain).max() > 0.01
    results = {"ours": {"rounds": [1.0, 2.0, 3.0]}, WITH + "ours": {"rounds": [2.7, 2.6, 9.0]}, "theirs": {"refused": "crashed"}}
    assert list(format_costs(results, ["ours", "theirs"])) == ["", "ours: a ControlNet adds 35% to a step"]


def test_without_diffusers_the_way_on_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="diffusers is not installed.*--no-against"):
        next(step.bench_step())
