import dataclasses
import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline

import weights_loader
from tests.checkpoints import assert_same_model, family_configs, family_model, ldm_tensors, part_to_file, plug_in_small_families
from tests.small_models import small_model
from weights_loader.contents import BUNDLED
from weights_loader.families.shared import VAE_PREFIX
from weights_loader.families.stable_diffusion_1 import CLIP_PREFIX
from weights_loader.load import LoadOptions, load_with_report
from weights_loader.name_table import ema_name
from weights_loader.read import read
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


# ------------------------------------------------------------------------------------- harmless things beside the weights

HARMLESS = {
    "embedding_manager.string_to_param_dict.*": (torch.zeros(1, 16), "old trainers"),
    "embedding_manager.initial_embeddings.*": (torch.zeros(1, 16), "old trainers"),
    "model_sampling.sigmas": (torch.zeros(1000), "noise schedule"),
    "cond_stage_model.transformer.vision_model.encoder.layers.0.mlp.fc1.weight": (torch.zeros(4, 4), "pictures"),
    "cond_stage_model.model.visual.conv1.weight": (torch.zeros(4, 3, 2, 2), "pictures"),
    "cond_stage_model.transformer.visual_projection.weight": (torch.zeros(4, 4), "pictures"),
    "safety_checker.concept_embeds": (torch.zeros(17, 4), "safety checker"),
    "scale_factor": (torch.tensor(0.18215), "factor of the latents"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_tensors_are_ignored_for_a_stated_reason(name, tmp_path):
    sd, (tensor, reason) = family_model("SD 1"), HARMLESS[name]
    torch.save(ldm_tensors(sd) | {name: tensor}, tmp_path / "model.ckpt")
    loaded = load_with_report(tmp_path / "model.ckpt", LoadOptions(config=sd.config))
    assert_same_model(loaded.sd, sd)
    assert reason in loaded.report.ignored[name]


def test_a_factor_of_the_latents_that_differs_is_taken(tmp_path, monkeypatch):
    sd = small_model(plug_in_small_families(monkeypatch)["SD 1"])
    for factor, expected in ((0.13025, pytest.approx(0.13025)), (torch.tensor(0.18215).half().item(), 0.18215)):
        write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd) | {"scale_factor": torch.tensor(factor)})
        assert weights_loader.load(tmp_path / "model.safetensors", prediction="eps").config.vae.scaling_factor == expected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out_and_told(prefix, tmp_path):
    sd = family_model("SD 1")
    write_safetensors(tmp_path / "model.safetensors", {prefix + name: tensor for name, tensor in ldm_tensors(sd).items()})
    loaded = weights_loader.load(tmp_path / "model.safetensors", config=sd.config)
    assert_same_model(loaded, sd)
    assert any("names begin as" in note for note in loaded.notes)


def test_a_wrapper_inside_a_name_and_one_around_a_vae_are_left_out_too(tmp_path):
    sd, other = family_model("SD 1"), small_model(family_configs()["SD 1"], seed=5)
    tensors = {name.replace("model.diffusion_model.", "model._orig_mod.diffusion_model."): t for name, t in ldm_tensors(sd).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_safetensors(tmp_path / "vae.safetensors", {f"vae.{name}": t for name, t in part_to_file(other, "vae", "diffusers").items()})
    loaded = weights_loader.load(tmp_path / "model.safetensors", config=sd.config, vae=tmp_path / "vae.safetensors")
    assert torch.equal(loaded.unet.conv_in.weight, sd.unet.conv_in.weight) and torch.equal(
        loaded.vae.quant_conv.weight, other.vae.quant_conv.weight
    )


def test_a_weight_with_and_without_a_wrapper_is_refused(tmp_path):
    tensors = ldm_tensors(family_model("SD 1"))
    name = next(iter(tensors))
    write_safetensors(tmp_path / "model.safetensors", tensors | {f"module.{name}": tensors[name]})
    with pytest.raises(ValueError, match="two weights have one name but for what wrappers put before it"):
        weights_loader.load(tmp_path / "model.safetensors")


def test_what_nobody_knows_is_left_out_only_when_asked(tmp_path):
    sd = family_model("SD 1")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, ldm_tensors(sd) | {"my_stats.mean": torch.zeros(3), "my_stats.count": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"2 unexpected[\s\S]*ignore=REGEX \(--ignore\)"):
        weights_loader.load(path, config=sd.config)
    with pytest.raises(ValueError, match="1 unexpected"):
        weights_loader.load(path, config=sd.config, ignore=r"mean$")
    with pytest.raises(ValueError, match=r"ignore '\(' is no regular expression"):
        weights_loader.load(path, config=sd.config, ignore="(")
    loaded = load_with_report(path, LoadOptions(config=sd.config, ignore=r"^my_stats\.|conv_in"))
    assert_same_model(loaded.sd, sd)  # a weight that is needed stays, whatever the pattern says
    assert loaded.report.ignored == dict.fromkeys(("my_stats.mean", "my_stats.count"), "left out, as ignore= (--ignore) asks")


@pytest.mark.parametrize("family", ["SD 1", "SD 2"])
def test_blocks_of_the_text_encoder_beyond_the_config_are_carried(family, tmp_path):
    config = family_configs()[family]
    deeper = small_model(dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, layers=4)))
    weights_loader.save(deeper, tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder/text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    weights = tmp_path / "folder/text_encoder/model.safetensors"
    projection = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    write_safetensors(weights, read(weights).tensors | {"text_projection.weight": projection})
    loaded = weights_loader.load(tmp_path / "folder")
    with torch.no_grad():
        expected = StableDiffusionPipeline.from_pretrained(tmp_path / "folder").text_encoder(loaded.tokenizer(["a cat"]))[0]
        assert torch.allclose(loaded.encode_prompts(["a cat"]), expected, atol=1e-5)  # float32 on both sides
    ldm = part_to_file(deeper, "text_encoder", "ldm")
    unused = {name: tensor for name, tensor in ldm.items() if re.search(r"(layers|resblocks)\.[23]\.", name)}
    assert unused and unused.keys() < loaded.extra_tensors.keys() and len(loaded.extra_tensors) == len(unused) + 1
    assert all(torch.equal(loaded.extra_tensors[name], tensor) for name, tensor in unused.items())
    weights_loader.save(loaded, tmp_path / "model.safetensors")
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "again")
    assert_same_model(weights_loader.load(tmp_path / "again"), loaded)


def test_a_vae_of_another_kind_is_not_advised_to_be_given_as_what_it_was_given(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "vae.safetensors", {f"encoder.down.0.block.{i}.conv9.weight": torch.zeros(1) for i in range(8)})
    with pytest.raises(
        ValueError, match="given as vae=, but it is a VAE of another kind than Stable Diffusion's.*it has no encoder.mid.block_1"
    ):
        weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors")
