"""What small files say of themselves, and that a file learned on another model is noticed."""

import dataclasses

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import create_tokens
from tests.small_files import random_delta, random_lora
from tests.small_models import small_config, small_model
from weights_loader.adapters.attach import attach, metadata_of
from weights_loader.adapters.origin import base_hashes

SETTINGS = {
    "method": "lora",
    "model": "base.safetensors",
    "concepts": [{"token": "sks", "class_word": "cat"}, {"token": "<it>", "class_word": ""}],
    "settings": {"steps": 300, "learning_rate": 0.002, "seed": 7},
}


@pytest.fixture(scope="module")
def sd():
    return small_model()


def written(kind, folder, sd, settings=None):
    """Files of each kind, by the argument of `attach` that takes them."""
    if kind == "lora":
        weights_loader.write_lora(folder / "x.safetensors", random_lora(sd), sd, settings=settings)
    elif kind == "embeddings":
        tokens = create_tokens(sd, {"<it>": 1}, {"<it>": "cat"})
        weights_loader.write_embedding(folder / "x.safetensors", tokens, settings=settings, sd=sd)
    else:
        weights_loader.write_custom_diffusion(folder / "x.safetensors", random_delta(sd, words=0), sd, settings)
    return folder / "x.safetensors"


@pytest.mark.parametrize("kind", ["lora", "embeddings", "custom_diffusion"])
def test_metadata_has_title_words_base_resolution_and_steps(kind, sd, tmp_path):
    found = metadata_of(written(kind, tmp_path, sd, SETTINGS))
    assert found["modelspec.title"] == found["modelspec.trigger_phrase"] == "sks cat, <it>"
    assert found["modelspec.resolution"] == "32x32" and found["ss_resolution"] == "(32, 32)"
    assert found["modelspec.prediction_type"] == "v" and found["modelspec.architecture"].startswith("minidiff/")
    assert (found["ss_sd_model_name"], found["ss_output_name"]) == ("base.safetensors", "x")
    assert (found["ss_steps"], found["ss_learning_rate"], found["ss_seed"]) == ("300", "0.002", "7")
    assert found["minidiff.base"].split() == list(base_hashes(sd))


def test_public_architectures_are_called_as_modelspec_calls_them(tmp_path):
    config = small_config("eps")
    for width, name in ((768, "stable-diffusion-v1/lora"), (1024, "stable-diffusion-v2/lora")):
        unet = dataclasses.replace(config.unet, context_width=width)
        text = dataclasses.replace(config.text_encoder, width=width)
        wide = small_model(dataclasses.replace(config, unet=unet, text_encoder=text))
        weights_loader.write_lora(tmp_path / "x.safetensors", random_lora(wide, r"attention\.to_q"), wide)
        found = metadata_of(tmp_path / "x.safetensors")
        assert found["modelspec.architecture"] == name and found["modelspec.prediction_type"] == "epsilon"
        assert found["modelspec.title"] == "x" and "modelspec.trigger_phrase" not in found


@pytest.mark.parametrize("kind", ["lora", "embeddings", "custom_diffusion"])
def test_a_file_on_another_model_than_it_was_learned_on_is_said(kind, sd, tmp_path):
    path = written(kind, tmp_path, sd, SETTINGS)
    same, other = small_model(), small_model(seed=1)
    for model in (same, other):
        attach(model, **{kind: path})
    assert not [note for note in same.notes if "another model" in note]
    note = [note for note in other.notes if "another model" in note]
    assert note == [f"{path} was learned on another model (base.safetensors) than this one: expect a weaker or a different effect"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_is_recognised_in_half_precision(dtype, sd):
    half = small_model()
    for part in half.parts.values():
        part.to(dtype)
    assert set(base_hashes(sd)) & set(base_hashes(half))
    assert not set(base_hashes(small_model(seed=1))) & set(base_hashes(half))


def test_files_that_say_nothing_are_not_doubted(sd, tmp_path):
    weights_loader.write_embedding(tmp_path / "x.bin", create_tokens(sd, {"<it>": 1}, {"<it>": "cat"}))
    other = small_model(seed=1)
    attach(other, embeddings=tmp_path / "x.bin")
    assert not [note for note in other.notes if "another model" in note]
