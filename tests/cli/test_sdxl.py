"""`minidiff generate`, `inspect` and `compare` with a small Stable Diffusion XL."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.cli.generate import parse_pair, resolve_negative, size_advice
from minidiff.pipeline import StableDiffusion
from minidiff.two_encoders import SizeNumbers
from tests.command import runner
from tests.small_models import small_model, xl_config


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


@pytest.fixture
def xl(tmp_path):
    weights_loader.save(small_model(xl_config()), tmp_path / "xl.safetensors")
    return weights_loader.load(tmp_path / "xl.safetensors")  # where weights lie in memory, sums may be rounded in another order


def draw(run, tmp_path, *flags):
    code, _, err = run("generate", "a cat", "--model", "xl.safetensors", "--steps", "2", "--size", "32", "--out", "a.png", *flags)
    assert code == 0, err
    picture = Image.open(tmp_path / "a.png")
    return np.asarray(picture), picture.text["parameters"]


@pytest.mark.parametrize(
    "flags, given, noted",
    [
        ((), {}, None),
        (("--negative-prompt", ""), {"negative_prompt": ""}, "Empty negative: encoded"),
        (("--empty-negative", "encoded"), {"negative_prompt": ""}, "Empty negative: encoded"),
        (("--negative-prompt", "", "--empty-negative", "zeros"), {"negative_prompt": None}, "Empty negative: zeros"),
        (("--prompt-2", "a dog"), {"prompt_2": "a dog"}, "Prompt 2: a dog"),
        (
            ("--original-size", "1025x640", "--crop", "3x517", "--target-size", "768x1280"),
            {"sizes": SizeNumbers((1025, 640), (3, 517), (768, 1280))},
            "Crop: 3x517",
        ),
    ],
)
def test_each_flag_draws_what_the_library_draws_with_it(run, tmp_path, xl, flags, given, noted):
    picture, said = draw(run, tmp_path, *flags)
    text = replace(xl.text, prompt_2=given.get("prompt_2"), sizes=given.get("sizes", SizeNumbers()))
    *_, step = xl.denoise("a cat", steps=2, size=32, negative_prompt=given.get("negative_prompt"), text=text)
    expected = ((xl.decode(step.x_t)[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(picture, expected)
    assert noted is None or noted in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--prompt-2", "a dog"), "--prompt-2 'a dog': this model has one text encoder"),
        (("--crop", "3x5"), "crop=(3, 5)"),
        (("--empty-negative", "zeros"), "--empty-negative zeros: this model has one text encoder"),
        (("--crop", "3"), "--crop 3: give two numbers of pixels"),
        (("--offload", "--device", "cpu"), "--offload moves parts of the model to a GPU"),
    ],
)
def test_a_flag_that_does_not_fit_the_model_is_one_line(run, flags, message):
    code, _, err = run("generate", "a cat", "--steps", "1", *flags)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_size_of_another_area_than_the_model_has_learned_is_said(xl):
    large = StableDiffusion(replace(xl.config, image_size=1024), xl.text, xl.unet, xl.vae)
    said = "the model was trained on pictures of about 1024 x 1024 pixels; of this shape that is --size 1216x832"
    assert size_advice(large, (768, 512)) == [said] and size_advice(large, (1536, 1024)) == [said]
    assert size_advice(large, (1216, 832)) == [] and size_advice(small_model(), (512, 8)) == []


def test_what_an_empty_negative_means():
    assert resolve_negative("blurry", "zeros") == "blurry"
    assert resolve_negative(None, None) is None and resolve_negative("", None) == ""
    assert resolve_negative(None, "encoded") == "" and resolve_negative("", "zeros") is None
    assert parse_pair("crop", None) is None and parse_pair("crop", "3X5") == (3, 5)


def test_it_is_inspected_and_compared(run, xl):
    code, out, _ = run("inspect", "xl.safetensors")
    assert code == 0 and "text encoder 2" in out
    code, out, _ = run("compare", "xl.safetensors", "xl.safetensors")
    assert code == 0, out
