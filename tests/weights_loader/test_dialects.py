import dataclasses
import re

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from minidiff.config import SD1, SD2
from minidiff.unet import UNet
from tests.checkpoints import family_configs, family_model, ldm_shapes, part_to_file, public_keys
from tests.small_models import small_model
from weights_loader.dialects import CLIP_LDM_ALIASES, TEXT_DIFFUSERS_ALIASES, VAE_DIFFUSERS_ALIASES
from weights_loader.empty_parts import empty_parts
from weights_loader.families import family_of_config, part_names
from weights_loader.name_table import canonical_name, ema_name, file_shapes, from_file, name_table, to_file
from weights_loader.report import Report

INPAINTING = dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, in_channels=9))


def parts_of(config, layout):
    """The modules on the meta device, and how a layout names them."""
    return [(part, part_names(config, name, layout)) for name, part in empty_parts(config).named().items()]


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("version, config", [(1, SD1), (2, SD2)])
def test_every_name_of_a_public_ldm_file_is_known_and_no_other_is_needed(version, config):
    keys = public_keys(version)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    tensors |= {ema_name(name): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    report = Report(family_of_config(config), config)
    prefixes = ("cond_stage_model.", "model.diffusion_model.", "first_stage_model.")
    for (part, names), prefix in zip(parts_of(config, "ldm"), prefixes):
        report.add_part(part, names, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    report.add_rest([name for name in tensors if not name.startswith(prefixes)])
    assert report.problem() is None
    assert len(report.used) + len(report.converted) + len(report.extra) + len(report.ignored) == len(tensors)
    assert len(report.extra) == (14 if version == 2 else 0)  # resblock 23, text_projection, logit_scale
    assert sum(name.startswith("model_ema.") for name in report.ignored) == 686 + 2


@pytest.mark.parametrize("version, config", [(1, SD1), (2, SD2)])
def test_full_size_names_and_shapes_map_to_ldm_and_back(version, config):
    keys = public_keys(version)
    for part, names in parts_of(config, "ldm"):
        written = to_file(part, names)
        assert shapes(written) == {name: keys[name] for name in written}
        locations, ours = name_table(part, names), part.state_dict()
        back = {name: from_file(written[there.name], there, ours[name]) for name, there in locations.items()}
        assert shapes(back) == shapes(ours)
        assert len({(there.name, there.qkv_index) for there in locations.values()}) == len(ours), "two parameters in one place"


@pytest.mark.parametrize("config", [SD1, SD2, INPAINTING], ids=["SD 1.5", "SD 2.1", "SD 1.5 inpainting"])
def test_full_size_names_and_shapes_are_those_of_diffusers_and_transformers(config):
    text, unet = config.text_encoder, config.unet
    with torch.device("meta"):
        theirs_unet = UNet2DConditionModel(
            in_channels=unet.in_channels,
            cross_attention_dim=unet.context_width,
            attention_head_dim=unet.heads,
            use_linear_projection=unet.linear_projection,
        )
        theirs_vae = AutoencoderKL(
            block_out_channels=config.vae.widths,
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        theirs_text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=text.width,
                intermediate_size=4 * text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                hidden_act=text.activation,
            )
        )
    ours_text, ours_unet, ours_vae = (file_shapes(part, names) for part, names in parts_of(config, "diffusers"))
    assert ours_unet == shapes(theirs_unet.state_dict())
    assert ours_vae == shapes(theirs_vae.state_dict())
    respelled = {canonical_name(name, TEXT_DIFFUSERS_ALIASES): t for name, t in theirs_text.state_dict().items()}
    respelled.pop("text_model.embeddings.position_ids", None)  # a buffer of older transformers
    assert ours_text == shapes(respelled)


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].reshape(tensor.shape), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", family_configs())
def test_ldm_names_become_diffusers_names_by_the_rules_of_diffusers_own_converter(name):
    sd = family_model(name)
    settings = {"layers_per_block": sd.config.unet.blocks_per_level}
    settings |= {"addition_embed_type": "text_time"} if sd.config.unet.pooled_width else {}
    theirs = convert_ldm_unet_checkpoint(part_to_file(sd, "unet", "ldm"), settings)
    assert_equal_tensors(part_to_file(sd, "unet", "diffusers"), theirs)

    levels = [""] * len(sd.config.vae.widths)
    theirs = convert_ldm_vae_checkpoint(part_to_file(sd, "vae", "ldm"), {"down_block_types": levels, "up_block_types": levels})
    assert_equal_tensors(part_to_file(sd, "vae", "diffusers"), theirs)

    ldm = part_to_file(sd, "text_encoder", "ldm")
    if sd.config.text_encoder.activation == "gelu":
        config = CLIPTextConfig(hidden_size=sd.config.text_encoder.width)
        theirs = convert_open_clip_checkpoint(_WithConfig(config), ldm)
    else:
        theirs = convert_ldm_clip_checkpoint(ldm)
    theirs = {canonical_name(name, TEXT_DIFFUSERS_ALIASES): tensor for name, tensor in theirs.items()}
    assert_equal_tensors(part_to_file(sd, "text_encoder", "diffusers"), theirs)
    if sd.config.text_encoder_2:
        config = CLIPTextConfig(hidden_size=sd.config.text_encoder_2.width)
        ldm = part_to_file(sd, "text_encoder_2", "ldm")
        theirs = convert_open_clip_checkpoint(_WithConfig(config), ldm, prefix="conditioner.embedders.1.model.")
        theirs = {canonical_name(name, TEXT_DIFFUSERS_ALIASES): tensor for name, tensor in theirs.items()}
        assert_equal_tensors(part_to_file(sd, "text_encoder_2", "diffusers"), theirs)


class _WithConfig:
    """What convert_open_clip_checkpoint reads of a model."""

    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", family_configs())
def test_what_is_written_is_read_back_bit_by_bit(name, layout):
    sd = family_model(name)
    for name, part in sd.parts.items():
        names = part_names(sd.config, name, layout)
        written, ours = to_file(part, names), part.state_dict()
        assert shapes(written) == file_shapes(part, names)
        for key, there in name_table(part, names).items():
            assert torch.equal(from_file(written[there.name], there, ours[key]), ours[key])


def test_reading_gives_views_of_the_files_tensors():
    sd = family_model("SD 2")
    for name in ("text_encoder", "vae"):
        part, names = sd.parts[name], part_names(sd.config, name, "ldm")
        written = to_file(part, names)
        for key, there in name_table(part, names).items():
            read = from_file(written[there.name], there, part.state_dict()[key])
            assert read.untyped_storage().data_ptr() == written[there.name].untyped_storage().data_ptr()


def test_older_spellings_are_known():
    assert (
        canonical_name("encoder.mid_block.attentions.0.query.weight", VAE_DIFFUSERS_ALIASES) == "encoder.mid_block.attentions.0.to_q.weight"
    )
    assert (
        canonical_name("decoder.mid_block.attentions.0.proj_attn.bias", VAE_DIFFUSERS_ALIASES)
        == "decoder.mid_block.attentions.0.to_out.0.bias"
    )
    expected = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert canonical_name("cond_stage_model.text_model.final_layer_norm.bias", CLIP_LDM_ALIASES) == expected
    assert canonical_name("cond_stage_model.transformer.final_layer_norm.bias", CLIP_LDM_ALIASES) == expected
    assert canonical_name(expected, CLIP_LDM_ALIASES) == expected
    assert canonical_name("encoder.layers.0.mlp.fc1.bias", TEXT_DIFFUSERS_ALIASES) == "text_model.encoder.layers.0.mlp.fc1.bias"


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout 'comfy' unknown; choose ldm or diffusers"):
        part_names(SD1, "unet", "comfy")


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_each_block_of_a_transformer_has_its_own_name(layout):
    config = family_configs()["SD 1"]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, attention=(2, 1, 3)))
    unet = UNet(config.unet)
    names, ours = part_names(config, "unet", layout), unet.state_dict()
    written = to_file(unet, names)
    assert shapes(written) == file_shapes(unet, names) and len(written) == len(ours)
    depths = {name.split("transformer_blocks.")[1][0] for name in written if "transformer_blocks." in name}
    assert depths == {"0", "1", "2"}
    for key, there in name_table(unet, names).items():
        assert torch.equal(from_file(written[there.name], there, ours[key]), ours[key])
        number = re.search(r"transformers?(?:\.\d+)?\.blocks\.(\d+)", key)
        assert number is None or f"transformer_blocks.{number[1]}." in there.name


def test_the_depth_of_transformers_is_read_off_the_names():
    config = family_configs()["SD 1"]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, attention=(2, 0, 3)))
    assert family_of_config(config).sizes(ldm_shapes(small_model(config)))["U-Net attention"] == (2, 0, 3)
