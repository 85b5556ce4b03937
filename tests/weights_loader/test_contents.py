import pytest
import torch

import weights_loader
from tests.checkpoints import assert_same_model, family_configs, family_model, ldm_tensors, part_to_file
from tests.small_models import small_model
from weights_loader.contents import BUNDLED
from weights_loader.families.shared import VAE_PREFIX
from weights_loader.families.stable_diffusion_1 import CLIP_PREFIX
from weights_loader.name_table import ema_name
from weights_loader.write import write_safetensors


def test_other_spellings_of_the_text_encoder_are_read(tmp_path):
    sd = family_model("SD 1")
    for spelling in ("cond_stage_model.text_model.", "cond_stage_model.transformer."):
        tensors = {name.replace(CLIP_PREFIX, spelling): tensor for name, tensor in ldm_tensors(sd).items()}
        write_safetensors(tmp_path / "model.safetensors", tensors)
        assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config), sd)


def test_a_weight_in_two_spellings_is_refused(tmp_path):
    tensors = ldm_tensors(family_model("SD 1"))
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    write_safetensors(tmp_path / "model.safetensors", tensors | {name.replace("transformer.", ""): tensors[name]})
    with pytest.raises(ValueError, match="1 weights occur twice"):
        weights_loader.load(tmp_path / "model.safetensors")


def test_the_moving_average_is_taken_only_when_asked_for(tmp_path):
    sd, average = family_model("SD 1"), small_model(family_configs()["SD 1"], seed=7)
    averages = {ema_name(name): tensor for name, tensor in part_to_file(average, "unet", "ldm").items()}
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


@pytest.mark.parametrize("kind", ["alone, with prefix", "alone, without prefix", "diffusers", "a whole model", "a diffusers folder"])
def test_a_vae_of_any_file_replaces_the_models(kind, tmp_path):
    sd, other = family_model("SD 1"), small_model(family_configs()["SD 1"], seed=5)
    weights_loader.save(sd, tmp_path / "model.safetensors")
    vae = part_to_file(other, "vae", "ldm")
    path = tmp_path / "vae.safetensors"
    match kind:
        case "alone, with prefix":
            write_safetensors(path, vae)
        case "alone, without prefix":
            bare = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in vae.items()}
            write_safetensors(path, bare | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)})
        case "diffusers":
            write_safetensors(path, part_to_file(other, "vae", "diffusers"))
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
    tensors = {name: tensor for name, tensor in ldm_tensors(sd).items() if not name.startswith(VAE_PREFIX)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_safetensors(tmp_path / "vae.safetensors", part_to_file(sd, "vae", "ldm"))
    assert_same_model(weights_loader.load(tmp_path / "model.safetensors", config=sd.config, vae=tmp_path / "vae.safetensors"), sd)
    with pytest.raises(ValueError, match="no vae in this file; give one as vae=FILE"):
        weights_loader.load(tmp_path / "model.safetensors", config=sd.config)


def test_something_else_given_as_vae_is_named(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "unet.safetensors", part_to_file(sd, "unet", "diffusers"))
    with pytest.raises(ValueError, match="given as vae=, but it is the U-Net of a diffusers model alone"):
        weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "unet.safetensors")


def test_a_name_that_is_no_path_lists_the_bundled_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no name of a bundled model; those are tiny"):
        weights_loader.load("huge")


def test_a_bundled_model_that_is_not_installed_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(BUNDLED, "tiny", tmp_path / "tiny.safetensors")
    with pytest.raises(FileNotFoundError, match="'tiny': this installation has no .*install minidiff again"):
        weights_loader.load("tiny")
