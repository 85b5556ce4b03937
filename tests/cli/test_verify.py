"""`minidiff verify`: the same file in diffusers' hands and ours, and a difference that is found where it is."""

import importlib.util

import pytest
import torch

import weights_loader
from minidiff.cli import verify as verify_command
from tests.checkpoints import family_model, ldm_tensors, plug_in_small_families, with_unknown_tensor
from tests.command import runner
from tests.small_models import small_model
from weights_loader import prediction

# diffusers with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name in ("SD 1", "SD 2", "SDXL") for layout in ("ldm", "diffusers")),
        *((f"{name} inpainting", "ldm") for name in ("SD 1", "SD 2", "SDXL")),
    ],
)
def test_a_checkpoint_is_the_same_in_diffusers(run, tmp_path, name, layout):
    sd = family_model(name)
    file = "model.safetensors" if layout == "ldm" else "model"
    weights_loader.save(sd, tmp_path / file, layout=layout)
    code, out, err = run("verify", file, "--steps", "4", "--size", "64")
    assert code == 0 and out.rstrip().splitlines()[-1].startswith("Verdict: the same"), out + err
    assert f"# {file}" in out and f"torch {torch.__version__.split('+')[0]}" in out and "diffusers 0." in out
    assert "family" in out and "predicts" in out and "Largest difference of the latent after each step: " in out
    assert ("All of the picture is masked for this inpainting model" in out) == ("inpainting" in name)
    weighted = [one for part in sd.parts.values() for one in part.modules() if any(True for _ in one.parameters(recurse=False))]
    counted = int(out.split("## ")[1].split(" ")[0])
    assert counted >= 0.95 * len(weighted) - 2  # but for layers that the encoder's last, unused block or the VAE's other half has


def test_a_pickle_without_any_settings_is_the_same_in_diffusers(run, tmp_path, monkeypatch):
    sd = small_model(plug_in_small_families(monkeypatch)["SD 1"])
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: 0.99)
    torch.save({"state_dict": ldm_tensors(sd), "epoch": 3}, tmp_path / "model.ckpt")
    code, out, err = run("verify", "model.ckpt", "--steps", "2", "--size", "64")
    assert code == 0 and out.rstrip().splitlines()[-1].startswith("Verdict: the same"), out + err
    assert "family      Stable Diffusion 1.x" in out and "predicts    eps, by a numerical test" in out


def test_the_bundled_model_is_the_same_in_diffusers_and_the_page_is_written_to_a_file(run, tmp_path):
    code, out, err = run("verify", "tiny", "--steps", "5", "--out", "page.md")
    assert (code, out.strip()) == (0, "page.md"), err
    assert "Verdict: the same" in (tmp_path / "page.md").read_text()


def test_the_first_layer_that_differs_is_named_and_the_exit_code_says_it(run, tmp_path, monkeypatch):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "model.safetensors")
    real = verify_command.their_pipeline

    def changed(file, sd):
        pipe = real(file, sd)
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight *= 1.5
        return pipe

    monkeypatch.setattr(verify_command, "their_pipeline", changed)
    code, out, _ = run("verify", "model.safetensors", "--steps", "2", "--size", "64")
    assert code == 1 and "Verdict: layer unet.middle.block_1.conv_1 differs first" in out, out


def test_without_diffusers_there_is_the_account_of_the_file(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "diffusers" else find(name, *rest))
    code, out, _ = run("verify", "tiny")
    assert code == 0 and "diffusers is not installed, so nothing was compared: pip install diffusers" in out
    assert "family" in out and "predicts" in out and "Verdict" not in out


def test_what_nobody_knows_is_left_out_only_when_asked(run, tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    file = with_unknown_tensor(tmp_path / "model.safetensors").name
    code, out, err = run("verify", file)
    assert (code, out) == (2, "") and "zorp.weight" in err
    code, out, err = run("verify", file, "--ignore", "^zorp", "--steps", "2", "--size", "64")
    assert code == 0 and "Verdict: the same" in out, out + err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--steps", "30"), "--steps 30: give a divisor of 1000, as 10 or 20; at others diffusers visits other timesteps"),
        (("--steps", "0"), "--steps 0: give a divisor of 1000"),
        (("--size", "65"), "size 65 x 65: width and height must be multiples of"),
        (("--seed", "-1"), "seed -1 is outside 0..2^64-1"),
    ],
)
def test_numbers_that_cannot_be_are_found_before_anything_is_compared(run, monkeypatch, args, said):
    monkeypatch.setattr(verify_command, "their_pipeline", lambda *_: pytest.fail("diffusers was asked"))
    code, out, err = run("verify", "tiny", *args)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1


def test_what_is_no_checkpoint_ends_in_one_line(run, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for args in (["nothing.safetensors"], ["x.safetensors"], ["tiny", "--out", "nowhere/page.md"]):
        code, out, err = run("verify", *args)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "Traceback" not in err
