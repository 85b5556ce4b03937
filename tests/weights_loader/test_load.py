import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import weights_loader
from minidiff.config import SD1
from tests.checkpoints import (
    CONTAINERS,
    assert_same_model,
    extras,
    family_configs,
    family_model,
    ldm_tensors,
    plug_in_small_families,
    public_keys,
)
from tests.small_models import small_config, small_model
from weights_loader import metadata, prediction
from weights_loader.families.shared import UNET_PREFIX
from weights_loader.load import _choose_dtype
from weights_loader.write import write_safetensors

FAMILIES = list(family_configs())
MAPS = Path("/proc/self/maps")  # on Linux: which file stands behind which address


# ------------------------------------------------------------------------------------------------- one file, LDM names


@pytest.mark.parametrize("family, container", [(family, "zip, wrapped") for family in FAMILIES] + [("SD 2", name) for name in CONTAINERS])
def test_every_family_is_read_bit_by_bit_from_every_container(family, container, tmp_path):
    sd = family_model(family)
    CONTAINERS[container](ldm_tensors(sd) | extras(sd.config), tmp_path / "model")
    assert_same_model(weights_loader.load(tmp_path / "model", config=sd.config), sd)


def test_transformers_stored_as_matrices_or_convolutions_give_the_same_model(tmp_path):
    sd = family_model("SD 1")
    tensors = {name: tensor[:, :, 0, 0] if "proj_in.weight" in name else tensor for name, tensor in ldm_tensors(sd).items()}
    assert tensors[f"{UNET_PREFIX}middle_block.1.proj_in.weight"].dim() == 2
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config), sd)


# ------------------------------------------------------------------------------------------------------ weights, dtype


def test_weights_are_windows_onto_the_file_unless_converted(tmp_path):
    sd = family_model("SD 2")
    sd.unet.half(), sd.vae.half(), sd.text_encoder.half()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    mapped = weights_loader.load(tmp_path / "model.safetensors", dtype="file")
    assert mapped.dtype == torch.float16
    if MAPS.exists():
        address = mapped.unet.conv_in.weight.data_ptr()
        ranges = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if line.endswith("model.safetensors")]
        assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges), "the weight was copied"
    query, key = (mapped.text_encoder.blocks[0].attention.get_submodule(name).weight for name in ("to_q", "to_k"))
    assert key.data_ptr() - query.data_ptr() == query.numel() * 2, "stacked matrices were copied apart"
    assert weights_loader.load(tmp_path / "model.safetensors").dtype == torch.float32
    assert weights_loader.load(tmp_path / "model.safetensors", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_changing_a_loaded_weight_leaves_the_file_alone(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        weights_loader.load(tmp_path / "model.safetensors").unet.conv_in.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_modules_are_frozen_and_in_eval_mode(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    sd = weights_loader.load(tmp_path / "model.safetensors")
    for part in (sd.text_encoder, sd.unet, sd.vae):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.gpu
def test_on_a_gpu_the_files_dtype_is_kept(tmp_path):
    sd = family_model("SD 1")
    sd.unet.half(), sd.vae.half(), sd.text_encoder.half()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    loaded = weights_loader.load(tmp_path / "model.safetensors", device="cuda")
    assert loaded.dtype == torch.float16 and loaded.device.type == "cuda"


# ----------------------------------------------------------------------------------------------- config, eps or v, names


def test_the_config_in_the_metadata_is_used(tmp_path):
    weights_loader.save(family_model("bundled"), tmp_path / "model.safetensors")
    assert weights_loader.load(tmp_path / "model.safetensors").config == small_config("v")


def test_a_size_of_its_own_without_metadata_asks_for_a_config(tmp_path):
    sd = family_model("bundled")
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    with pytest.raises(ValueError, match=r"no known family.*pass config=ModelConfig.*U-Net widths \(16, 16, 32\)"):
        weights_loader.load(tmp_path / "model.safetensors")


def test_prediction_overrides_the_file_and_is_checked(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    assert weights_loader.load(tmp_path / "model.safetensors").config.schedule.prediction == "eps"
    sd = weights_loader.load(tmp_path / "model.safetensors", prediction="v")
    assert sd.config.schedule.prediction == sd.schedule.config.prediction == "v"
    with pytest.raises(ValueError, match="prediction 'x0' unknown; choose eps or v"):
        weights_loader.load(tmp_path / "model.safetensors", prediction="x0")
    with pytest.raises(ValueError, match="dtype 'half' unknown"):
        weights_loader.load(tmp_path / "model.safetensors", dtype="half")


@pytest.fixture
def small_families(monkeypatch):
    return plug_in_small_families(monkeypatch)


def test_a_family_is_recognised(small_families, tmp_path):
    sd = small_model(small_families["SD 1"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    loaded = weights_loader.load(tmp_path / "model.safetensors", prediction="eps")
    assert_same_model(loaded, sd)
    assert loaded.notes == ()


@pytest.mark.parametrize("stated, expected", [("v", "v"), ("epsilon", "eps")])
def test_the_size_of_pictures_follows_the_prediction(small_families, stated, expected, tmp_path):
    sd = small_model(small_families["SD 2"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd), {"modelspec.prediction_type": stated})
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == expected
    assert loaded.config.image_size == (512 if expected == "eps" else small_families["SD 2"].image_size)


@pytest.mark.parametrize("correlation, expected", [(0.98, "eps"), (0.03, "v")])
def test_an_sd_2_file_that_says_nothing_is_tested_and_the_decision_is_said(small_families, correlation, expected, tmp_path, monkeypatch):
    sd = small_model(small_families["SD 2"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: correlation)
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == loaded.schedule.config.prediction == expected
    assert loaded.notes[0].startswith(f"predicts {expected}: decided by a numerical test")
    monkeypatch.setattr(prediction, "noise_correlation", None)  # not called again where the caller says it
    assert weights_loader.load(tmp_path / "model.safetensors", prediction="eps").notes == ()


def test_a_tokenizer_larger_than_the_text_encoder_is_refused(tmp_path):
    sd = family_model("bundled")
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    config = dataclasses.replace(sd.config, tokenizer=SD1.tokenizer)
    with pytest.raises(ValueError, match="the tokenizer knows 49408 tokens, the text encoder"):
        weights_loader.load(tmp_path / "model.safetensors", config=config)


@pytest.mark.slow
def test_a_full_size_sd_1_of_made_up_weights_loads_and_answers(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def make_up(name, shape):
        if name.endswith("position_ids"):
            return torch.arange(77)[None]
        norm = len(shape) == 1 and name.endswith("weight")
        return torch.ones(shape).half() if norm else torch.randn(shape, generator=generator).mul_(0.02).half()

    tensors = {name: make_up(name, shape) for name, shape in public_keys(1).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"minidiff.config": metadata.config_to_json(SD1)})
    sd = weights_loader.load(tmp_path / "model.safetensors")
    assert sd.config == SD1 and sd.dtype == torch.float32 and sd.notes == ()
    (picture,) = sd.generate("a photo of a cat", steps=2, size=64)
    assert picture.size == (64, 64) and np.asarray(picture).std() > 0


def test_broken_weights_are_not_taken_for_a_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: float("nan"))
    sd = family_model("SD 2")
    with pytest.raises(ValueError, match="the U-Net's answer is not finite"):
        prediction.ask_prediction(sd.config, sd.unet, sd.text)


def test_whole_numbers_are_refused_as_weights():
    with pytest.raises(ValueError, match="whole numbers: a quantised model"):
        _choose_dtype("file", torch.device("cpu"), {"unet": {"w": torch.ones(1, dtype=torch.int8)}})


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("text_encoder", "layers"), 10**6, "the config asks for 1000000 blocks in the text encoder, and there are"),
        (("unet", "blocks_per_level"), 10**6, "the config asks for 3000000 blocks in the unet"),
        (("unet", "attention"), [10**6, 1, 0], "the config asks for 3000000 blocks in the unet"),
        (("vae", "blocks_per_level"), 0, "the config asks for 0 blocks in the vae"),
        (("schedule", "timesteps"), 10**9, "the config asks for schedule.timesteps 1000000000; expected 0 to 1048576"),
        (("schedule", "timesteps"), 10**6, "the config asks for 1000000 timesteps; at most 100000"),
        (("text_encoder", "width"), 2**60, "the config asks for text_encoder.width"),
        (("unet", "in_channels"), -4, "the config asks for unet.in_channels -4"),
        (("vae", "scaling_factor"), 0.0, "the config's scaling_factor is 0.0"),
        (("schedule", "beta_start"), 3.0, "expected 0 < beta_start"),
    ],
    ids=str,
)
def test_metadata_that_ask_for_more_than_the_file_holds_are_refused_before_anything_is_built(path, value, message, tmp_path):
    sd = family_model("bundled")
    config = json.loads(metadata.config_to_json(sd.config))
    config[path[0]][path[1]] = value
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd), {metadata.KEY: json.dumps(config)})
    with pytest.raises(ValueError, match=message):
        weights_loader.load(tmp_path / "model.safetensors")
