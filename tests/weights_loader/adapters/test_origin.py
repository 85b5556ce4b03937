"""What small files say of themselves, and that a file learned on another model is noticed."""

import dataclasses

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import create_tokens
from minidiff.pipeline import StableDiffusion
from tests.small_files import random_delta, random_lora
from tests.small_models import small_config, small_model
from weights_loader.adapters.attach import attach, metadata_of
from weights_loader.adapters.origin import base_hashes
from weights_loader.read import verify

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
    assert found["modelspec.sai_model_spec"] == "1.0.0" and found["modelspec.implementation"] == "minidiff"
    assert found["minidiff.base"].split() == list(base_hashes(sd))


def test_public_architectures_are_called_as_modelspec_calls_them(tmp_path):
    config = small_config("eps")
    names = {768: "stable-diffusion-v1/lora", 1024: "stable-diffusion-v2-512/lora", 2048: "stable-diffusion-xl-v1-base/lora"}
    versions = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
    for width, name in names.items():
        unet = dataclasses.replace(config.unet, context_width=width)
        text = dataclasses.replace(config.text_encoder, width=width)
        wide = small_model(dataclasses.replace(config, unet=unet, text_encoder=text))
        weights_loader.write_lora(tmp_path / "x.safetensors", random_lora(wide, r"attention\.to_q"), wide)
        found = metadata_of(tmp_path / "x.safetensors")
        assert found["modelspec.architecture"] == name and found["modelspec.prediction_type"] == "epsilon"
        assert found["modelspec.title"] == "x" and "modelspec.trigger_phrase" not in found
        # By these the web interfaces sort, and hide what is for other models.
        assert (found["ss_base_model_version"], found["ss_v2"]) == (versions[width], str(width == 1024))
        config_v = dataclasses.replace(wide.config, schedule=dataclasses.replace(config.schedule, prediction="v"))
        v = StableDiffusion(config_v, wide.text, wide.unet, wide.vae)
        weights_loader.write_lora(tmp_path / "x.safetensors", random_lora(v, r"attention\.to_q"), v)
        found = metadata_of(tmp_path / "x.safetensors")
        assert found["modelspec.prediction_type"] == "v"
        assert found["modelspec.architecture"] == ("stable-diffusion-v2-768-v/lora" if width == 1024 else name)


@pytest.mark.parametrize("kind", ["lora", "embeddings", "custom_diffusion"])
def test_the_hash_of_the_numbers_shows_damage(kind, sd, tmp_path):
    path = written(kind, tmp_path, sd, SETTINGS)
    assert verify(path) == (f"{path}: the numbers are those of its modelspec.hash_sha256",)
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert f"{path}: not the numbers of its modelspec.hash_sha256" in verify(path)[0]


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
