"""`bench train` on a very small model: both libraries have the same loss, and learn. Its times mean nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minidiff.bench import pipelines
from minidiff.bench import train as train_bench
from minidiff.bench.train import METHODS, bench_train, make_train_jobs, prepare, sample
from tests.small_models import training_config, xl_config


@pytest.fixture(scope="module", params=["one text encoder", "two"])
def folder(request):
    from PIL import Image

    config = training_config() if request.param == "one text encoder" else replace(xl_config(), image_size=64)
    with pipelines.model_folder(config) as folder:
        torch.save(sample(config, 64), folder / "sample.pt")
        for name in ("subject", "class"):
            (folder / name).mkdir()
            Image.effect_noise((64, 64), 50).convert("RGB").save(folder / name / "0.png")
        yield folder


def is_xl(folder):
    return (folder / "model" / "text_encoder_2").exists()


@pytest.mark.parametrize("method", METHODS)
def test_both_have_the_same_loss_and_steps_change_it(folder, tmp_path, monkeypatch, method):
    monkeypatch.setattr(train_bench, "RATE", 1e-2)  # so that two steps show
    if is_xl(folder) and method == "custom-diffusion":
        job = {"folder": str(folder), "device": "cpu", "how": "eager", "dtype": "float32", "library": "diffusers", "method": method}
        with pytest.raises(ValueError, match="no example of diffusers teaches Custom Diffusion to a model of two text encoders"):
            prepare(job | {"size": 64})
        return
    first = []
    for library in ("diffusers", "minidiff"):
        job = {"folder": str(folder), "device": "cpu", "how": "eager", "dtype": "float32", "library": library}
        answer = prepare(job | {"method": method, "size": 64})
        losses = []
        for _ in range(2):  # each check is the loss as it is, then two steps
            answer({"do": "check", "result": str(tmp_path / "result.npy")})
            losses.append(float(np.load(tmp_path / "result.npy").item()))
        assert losses[0] != losses[1] and answer({"do": "time", "repeats": 1})["seconds"] > 0
        first.append(losses[0])
    assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] > 0.1  # float32 parity


def test_on_a_gpu_all_but_the_errors_reference_are_bfloat16():
    jobs = make_train_jobs("cuda", against=True)
    assert next(iter(jobs)) == "diffusers" and {name for name, job in jobs.items() if job["dtype"] == "float32"} == {"minidiff float32"}
    assert not any("diffusers" in name for name in make_train_jobs("cpu", against=False))


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValueError, match="method 'dreambooth' unknown; choose lora, custom-diffusion"):
        next(bench_train(methods=("dreambooth",)))
    with pytest.raises(ValueError, match="rounds 0"):
        next(bench_train(rounds=0))


@pytest.mark.slow
def test_the_bench_runs_in_processes_of_its_own():
    lines = "\n".join(bench_train(rounds=1, model=training_config(), size=64))
    assert lines.count("| minidiff bfloat16 |") == 2 and lines.count("| diffusers float32 |") == 2 and "refused" not in lines
