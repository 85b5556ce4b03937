"""The bundled model in diffusers' own pipeline: the whole path, on trained weights, against independent code. And what its file holds."""

import gzip
import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

import weights_loader
from minidiff.pipeline import noise_source
from minidiff.scenes.scenes import bpe_merges
from weights_loader.contents import BUNDLED
from weights_loader.load import load_with_report
from weights_loader.metadata import KEY, config_from_json

FILE = BUNDLED["tiny"]
APPLE = "a red apple on a blue background"
SEED = 3


@pytest.fixture(scope="module")
def sd():
    return weights_loader.load("tiny")


@pytest.fixture(scope="module")
def folder(sd, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundled") / "folder"
    weights_loader.save(sd, path, layout="diffusers")
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    """With its own tokenizer, text encoder, U-Net, VAE and scheduler, all from the folder."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_picture(pipe, prompt: str, steps: int, **settings) -> Image.Image:
    latents = noise_source([SEED], (pipe.unet.config.in_channels, 16, 16), torch.device("cpu"))()
    return pipe(prompt, num_inference_steps=steps, latents=latents, **settings).images[0]


def difference(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest, of 255."""
    assert ours.size == theirs.size == (128, 128)
    assert np.asarray(theirs).std() > 10, "a picture of one colour; anything near it would do"
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max())


# Numbers of steps that divide 1000: at others diffusers' DDIM goes on from timesteps that are not those it visits next.
@pytest.mark.parametrize(
    "prompt, negative_prompt, guidance_scale, steps",
    [
        (APPLE, "", 4.0, 25),
        ("a cat and a pizza on a green background", "", 1.0, 20),
        ("a small ROCKET, left of 2 houses!", "a red background", 4.0, 20),
        ("", "", 4.0, 20),
        ("", "a dog on a white background", 7.5, 20),
    ],
)
def test_a_picture_is_that_of_diffusers_own_pipeline(prompt, negative_prompt, guidance_scale, steps, sd, pipe, record_property):
    settings = dict(negative_prompt=negative_prompt, guidance_scale=guidance_scale)
    theirs = their_picture(pipe, prompt, steps, **settings)
    ours = sd.generate(prompt, seed=SEED, steps=steps, **settings)[0]
    # Float32 leaves 1e-4 of the range at most; where that crosses the middle between two of 255 values, the pixel differs by 1.
    error = difference(ours, theirs)
    assert error <= 2
    record_property("parity", ("bundled model, prompt to 8-bit picture", "diffusers StableDiffusionPipeline", "float32", error / 255))


def test_a_v_model_taken_for_an_eps_model_would_be_noticed(folder, pipe):
    """From timestep 951 on, where an eps-model has something to begin with."""
    settings = dict(guidance_scale=4.0)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    theirs = their_picture(diffusers.StableDiffusionPipeline(**pipe.components | {"scheduler": scheduler}), APPLE, 20, **settings)
    for prediction, noticed in (("v", False), ("eps", True)):
        sd = weights_loader.load(folder, prediction=prediction)
        ours = sd.generate(APPLE, seed=SEED, steps=20, spacing="leading", **settings)[0]
        assert (difference(ours, theirs) > 50) == noticed


def pixels(sd) -> torch.Tensor:
    *_, last = sd.denoise(APPLE, steps=4, seeds=[SEED])
    return sd.decode(last.x_t)


def same_weights(a, b) -> bool:
    states = [{f"{part}.{name}": p for part, module in sd.parts.items() for name, p in module.state_dict().items()} for sd in (a, b)]
    return states[0].keys() == states[1].keys() and all(torch.equal(p, states[1][name]) for name, p in states[0].items())


def test_the_folder_and_the_file_made_of_it_hold_the_same_bits_and_give_the_same_picture(sd, folder, tmp_path):
    expected = pixels(sd)
    loaded = weights_loader.load(folder)
    weights_loader.save(loaded, tmp_path / "again.safetensors")
    again = weights_loader.load(tmp_path / "again.safetensors")
    assert loaded.config == sd.config and same_weights(sd, loaded) and same_weights(sd, again)
    # Weights are windows onto the files. Where one begins at another address, some processors add in another order: 1e-6 per call of the U-Net.
    for other in (loaded, again):
        torch.testing.assert_close(pixels(other), expected, rtol=0, atol=1e-4)


def test_through_a_folder_in_its_own_dtype_the_file_comes_back_byte_for_byte(tmp_path):
    weights_loader.convert(FILE, tmp_path / "folder")
    weights_loader.convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == FILE.read_bytes()


# What the file holds


def test_the_file_is_of_half_precision_and_no_larger_than_20_megabytes():
    assert FILE.stat().st_size <= 20_000_000
    with safetensors.safe_open(FILE, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def kinds(names: list[str]) -> set[str]:
    return {re.sub(r"\d+", "#", name) for name in names}


def test_the_names_are_those_of_stable_diffusion_1():
    """The names but for the numbers in them: a smaller model has fewer of each kind, and no other kind."""
    original = kinds(json.loads(gzip.decompress((Path(__file__).parent.parent / "data" / "sd-v1-keys.json.gz").read_bytes())))
    with safetensors.safe_open(FILE, "pt") as file:
        own = kinds(list(file.keys()))
    assert own <= original
    # Nothing but the tables of the noise schedule, and the numbers 0, 1, 2, ... of the positions, is left out.
    assert all(re.fullmatch(r"[a-z_#]+|.*position_ids|model_ema\..*", name) for name in original - own)


def test_every_tensor_of_the_file_is_used():
    report = load_with_report("tiny").report
    assert not report.extra and not report.ignored
    with safetensors.safe_open(FILE, "pt") as file:
        assert sorted([*report.used, *report.converted]) == sorted(file.keys())


def test_the_metadata_tells_the_config_and_the_words(sd):
    with safetensors.safe_open(FILE, "pt") as file:
        config = config_from_json(file.metadata()[KEY])
    assert config == sd.config
    assert config.tokenizer.merges == bpe_merges()
    lines = (Path(weights_loader.__file__).parent.parent / "minidiff" / "scenes" / "bpe.txt").read_text(encoding="utf-8").splitlines()
    assert list(config.tokenizer.merges) == lines[1:]
    assert sd.tokenizer.vocab_size == config.text_encoder.vocab_size
