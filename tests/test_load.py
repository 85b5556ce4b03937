import dataclasses

import numpy as np
import pytest
import torch

import weights_loader
from minidiff.config import SD1
from tests.checkpoints import CONTAINERS, assert_same_model, extras, family_configs, family_model, ldm_tensors, public_keys
from tests.small_models import small_config, small_model
from weights_loader import detect, dialects, metadata
from weights_loader.load import BUNDLED
from weights_loader.write import write_safetensors

FAMILIES = list(family_configs())


# ------------------------------------------------------------------------------------------------- one file, LDM names


@pytest.mark.parametrize("family, container", [(family, "zip, wrapped") for family in FAMILIES] + [("SD 2", name) for name in CONTAINERS])
def test_every_family_is_read_bit_by_bit_from_every_container(family, container, tmp_path):
    sd = family_model(family)
    CONTAINERS[container](ldm_tensors(sd) | extras(sd.config), tmp_path / "model")
    assert_same_model(weights_loader.load(tmp_path / "model", config=sd.config), sd)


def test_other_spellings_of_the_text_encoder_are_read(tmp_path):
    sd = family_model("SD 1")
    for spelling in ("cond_stage_model.text_model.", "cond_stage_model.transformer."):
        tensors = {name.replace(dialects.CLIP_PREFIX, spelling): tensor for name, tensor in ldm_tensors(sd).items()}
        write_safetensors(tmp_path / "model.safetensors", tensors)
        assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config), sd)


def test_a_weight_in_two_spellings_is_refused(tmp_path):
    tensors = ldm_tensors(family_model("SD 1"))
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    write_safetensors(tmp_path / "model.safetensors", tensors | {name.replace("transformer.", ""): tensors[name]})
    with pytest.raises(ValueError, match="1 weights occur twice"):
        weights_loader.load(tmp_path / "model.safetensors")


def test_transformers_stored_as_matrices_or_convolutions_give_the_same_model(tmp_path):
    sd = family_model("SD 1")
    tensors = {name: tensor[:, :, 0, 0] if "proj_in.weight" in name else tensor for name, tensor in ldm_tensors(sd).items()}
    assert tensors[f"{dialects.UNET_PREFIX}middle_block.1.proj_in.weight"].dim() == 2
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config), sd)


def test_the_moving_average_is_taken_only_when_asked_for(tmp_path):
    sd, average = family_model("SD 1"), small_model(family_configs()["SD 1"], seed=7)
    averages = {dialects.ema_name(name): tensor for name, tensor in dialects.to_file(average.unet, "ldm").items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int32)}
    torch.save({"state_dict": ldm_tensors(sd) | averages | counters}, tmp_path / "model.ckpt")

    assert_same_model(weights_loader.load(tmp_path / "model.ckpt", config=sd.config), sd)
    loaded = weights_loader.load(tmp_path / "model.ckpt", config=sd.config, ema=True)
    assert torch.equal(loaded.unet.conv_in.weight, average.unet.conv_in.weight)
    assert torch.equal(loaded.vae.encoder.conv_in.weight, sd.vae.encoder.conv_in.weight)
    assert any("moving average" in note for note in loaded.notes)


def test_asking_for_a_moving_average_that_is_not_there_is_an_error(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ema=True, but 324 of the 324 U-Net weights have no moving average in this file.*ema=False"):
        weights_loader.load(tmp_path / "model.safetensors", ema=True)


# ------------------------------------------------------------------------------------------------------ weights, dtype


def test_weights_are_windows_onto_the_file_unless_converted(tmp_path):
    sd = family_model("SD 2")
    sd.unet.half(), sd.vae.half(), sd.text_encoder.half()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    mapped = weights_loader.load(tmp_path / "model.safetensors", dtype="file")
    assert mapped.dtype == torch.float16
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


# ------------------------------------------------------------------------------------------------------------ a VAE


@pytest.mark.parametrize("kind", ["alone, with prefix", "alone, without prefix", "diffusers", "a whole model", "a diffusers folder"])
def test_a_vae_of_any_file_replaces_the_models(kind, tmp_path):
    sd, other = family_model("SD 1"), small_model(family_configs()["SD 1"], seed=5)
    weights_loader.save(sd, tmp_path / "model.safetensors")
    vae = dialects.to_file(other.vae, "ldm")
    path = tmp_path / "vae.safetensors"
    match kind:
        case "alone, with prefix":
            write_safetensors(path, vae)
        case "alone, without prefix":
            bare = {name.removeprefix(dialects.VAE_PREFIX): tensor for name, tensor in vae.items()}
            write_safetensors(path, bare | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)})
        case "diffusers":
            write_safetensors(path, dialects.to_file(other.vae, "diffusers"))
        case "a whole model":
            weights_loader.save(other, path)
        case "a diffusers folder":
            path = tmp_path / "other"
            weights_loader.save(other, path, layout="diffusers")
    loaded = weights_loader.load(tmp_path / "model.safetensors", vae=path)
    sd.vae = other.vae
    assert_same_model(loaded, sd)
    assert any("VAE taken from" in note for note in loaded.notes)


def test_a_model_without_a_vae_is_loaded_with_one_and_says_so_without(tmp_path):
    sd = family_model("SD 1")
    tensors = {name: tensor for name, tensor in ldm_tensors(sd).items() if not name.startswith(dialects.VAE_PREFIX)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_safetensors(tmp_path / "vae.safetensors", dialects.to_file(sd.vae, "ldm"))
    assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config, vae=tmp_path / "vae.safetensors"), sd)
    with pytest.raises(ValueError, match="no vae in this file; give one as vae=FILE"):
        weights_loader.load(tmp_path / "model.safetensors", config=sd.config)


def test_something_else_given_as_vae_is_named(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "unet.safetensors", dialects.to_file(sd.unet, "diffusers"))
    with pytest.raises(ValueError, match="given as vae=, but it is the U-Net of a diffusers model alone"):
        weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "unet.safetensors")


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
    """The small models take the places of the public ones, so that they are recognised without a config."""
    configs = family_configs()
    monkeypatch.setitem(detect.FAMILIES, "Stable Diffusion 1.x", configs["SD 1"])
    monkeypatch.setattr(detect, "OPEN_CLIP_LAYERS", 3)
    # The small ones are as wide as each other; the real ones are not.
    wider = dataclasses.replace(configs["SD 2"], text_encoder=dataclasses.replace(configs["SD 2"].text_encoder, width=32, heads=4))
    wider = dataclasses.replace(wider, unet=dataclasses.replace(wider.unet, context_width=32))
    monkeypatch.setitem(detect.FAMILIES, "Stable Diffusion 2.x", wider)
    return {"SD 1": configs["SD 1"], "SD 2": wider}


def test_a_family_is_recognised_and_sd_1_needs_no_test_of_its_prediction(small_families, tmp_path):
    sd = small_model(small_families["SD 1"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert_same_model(loaded, sd)
    assert loaded.notes == ()


@pytest.mark.parametrize("stated, expected", [("v", "v"), ("epsilon", "eps")])
def test_metadata_of_other_programs_says_the_prediction(small_families, stated, expected, tmp_path):
    sd = small_model(small_families["SD 2"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd), {metadata.PREDICTION_KEY: stated})
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == expected and loaded.notes == ()
    assert loaded.config.image_size == (512 if expected == "eps" else small_families["SD 2"].image_size)


@pytest.mark.parametrize("correlation, expected", [(0.98, "eps"), (0.03, "v")])
def test_an_sd_2_file_that_says_nothing_is_tested_and_the_decision_is_said(small_families, correlation, expected, tmp_path, monkeypatch):
    sd = small_model(small_families["SD 2"])
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    monkeypatch.setattr(detect, "noise_correlation", lambda *parts: correlation)
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == loaded.schedule.config.prediction == expected
    assert loaded.notes[0].startswith(f"predicts {expected}: decided by a numerical test")
    monkeypatch.setattr(detect, "noise_correlation", None)  # not called again where the caller says it
    assert weights_loader.load(tmp_path / "model.safetensors", prediction="eps").notes == ()


def test_a_name_that_is_no_path_lists_the_bundled_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no name of a bundled model; those are tiny"):
        weights_loader.load("huge")


def test_a_bundled_model_that_is_not_installed_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(BUNDLED, "tiny", tmp_path / "tiny.safetensors")
    with pytest.raises(FileNotFoundError, match="'tiny': this installation has no .*install minidiff again"):
        weights_loader.load("tiny")


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

    write_safetensors(tmp_path / "model.safetensors", {name: make_up(name, shape) for name, shape in public_keys(1).items()})
    sd = weights_loader.load(tmp_path / "model.safetensors")
    assert sd.config == SD1 and sd.dtype == torch.float32 and sd.notes == ()
    (picture,) = sd.generate("a photo of a cat", steps=2, size=64)
    assert picture.size == (64, 64) and np.asarray(picture).std() > 0
