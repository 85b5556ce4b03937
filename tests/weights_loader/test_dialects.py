import dataclasses

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
from minidiff.text_encoder import TextEncoder
from minidiff.unet import UNet
from minidiff.vae import VAE
from tests.checkpoints import family_configs, family_model, public_keys
from weights_loader import dialects
from weights_loader.report import Report

INPAINTING = dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, in_channels=9))


def parts_of(config):
    with torch.device("meta"):
        return TextEncoder(config.text_encoder), UNet(config.unet), VAE(config.vae)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("version, config", [(1, SD1), (2, SD2)])
def test_every_name_of_a_public_ldm_file_is_known_and_no_other_is_needed(version, config):
    keys = public_keys(version)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    tensors |= {dialects.ema_name(name): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    report = Report(config.text_encoder.layers)
    prefixes = ("cond_stage_model.", "model.diffusion_model.", "first_stage_model.")
    for part, prefix in zip(parts_of(config), prefixes):
        report.add_part(part, "ldm", {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    report.add_rest([name for name in tensors if not name.startswith(prefixes)])
    assert report.problem() is None
    assert len(report.used) + len(report.converted) + len(report.carried) + len(report.ignored) == len(tensors)
    assert len(report.carried) == (14 if version == 2 else 0)  # resblock 23, text_projection, logit_scale
    assert sum(name.startswith("model_ema.") for name in report.ignored) == 686 + 2


@pytest.mark.parametrize("version, config", [(1, SD1), (2, SD2)])
def test_full_size_names_and_shapes_map_to_ldm_and_back(version, config):
    keys = public_keys(version)
    for part in parts_of(config):
        written = dialects.to_file(part, "ldm")
        assert shapes(written) == {name: keys[name] for name in written}
        places, ours = dialects.table(part, "ldm"), part.state_dict()
        back = {name: dialects.from_file(written[place.name], place, ours[name]) for name, place in places.items()}
        assert shapes(back) == shapes(ours)
        assert len({(place.name, place.third) for place in places.values()}) == len(ours), "two parameters in one place"


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
    ours_text, ours_unet, ours_vae = (dialects.file_shapes(part, "diffusers") for part in parts_of(config))
    assert ours_unet == shapes(theirs_unet.state_dict())
    assert ours_vae == shapes(theirs_vae.state_dict())
    respelled = {dialects.respell(name, dialects.TEXT_ENCODER_SPELLINGS): t for name, t in theirs_text.state_dict().items()}
    respelled.pop("text_model.embeddings.position_ids", None)  # a buffer of older transformers
    assert ours_text == shapes(respelled)


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].reshape(tensor.shape), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", family_configs())
def test_ldm_names_become_diffusers_names_by_the_rules_of_diffusers_own_converter(name):
    sd = family_model(name)
    theirs = convert_ldm_unet_checkpoint(dialects.to_file(sd.unet, "ldm"), {"layers_per_block": sd.config.unet.blocks_per_level})
    assert_equal_tensors(dialects.to_file(sd.unet, "diffusers"), theirs)

    levels = [""] * len(sd.config.vae.widths)
    theirs = convert_ldm_vae_checkpoint(dialects.to_file(sd.vae, "ldm"), {"down_block_types": levels, "up_block_types": levels})
    assert_equal_tensors(dialects.to_file(sd.vae, "diffusers"), theirs)

    ldm = dialects.to_file(sd.text_encoder, "ldm")
    if sd.config.text_encoder.activation == "gelu":
        config = CLIPTextConfig(hidden_size=sd.config.text_encoder.width)
        theirs = convert_open_clip_checkpoint(_WithConfig(config), ldm)
    else:
        theirs = convert_ldm_clip_checkpoint(ldm)
    theirs = {dialects.respell(name, dialects.TEXT_ENCODER_SPELLINGS): tensor for name, tensor in theirs.items()}
    assert_equal_tensors(dialects.to_file(sd.text_encoder, "diffusers"), theirs)


class _WithConfig:
    """What convert_open_clip_checkpoint reads of a model."""

    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", family_configs())
def test_what_is_written_is_read_back_bit_by_bit(name, layout):
    sd = family_model(name)
    for part in (sd.text_encoder, sd.unet, sd.vae):
        written, ours = dialects.to_file(part, layout), part.state_dict()
        assert shapes(written) == dialects.file_shapes(part, layout)
        for key, place in dialects.table(part, layout).items():
            assert torch.equal(dialects.from_file(written[place.name], place, ours[key]), ours[key])


def test_reading_gives_views_of_the_files_tensors():
    sd = family_model("SD 2")
    for part in (sd.text_encoder, sd.vae):
        written = dialects.to_file(part, "ldm")
        for key, place in dialects.table(part, "ldm").items():
            read = dialects.from_file(written[place.name], place, part.state_dict()[key])
            assert read.untyped_storage().data_ptr() == written[place.name].untyped_storage().data_ptr()


def test_older_spellings_are_known():
    def spell(name, spellings):
        return dialects.respell(name, spellings)

    assert spell("encoder.mid_block.attentions.0.query.weight", dialects.VAE_SPELLINGS) == "encoder.mid_block.attentions.0.to_q.weight"
    assert spell("decoder.mid_block.attentions.0.proj_attn.bias", dialects.VAE_SPELLINGS) == "decoder.mid_block.attentions.0.to_out.0.bias"
    expected = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert spell("cond_stage_model.text_model.final_layer_norm.bias", dialects.LDM_SPELLINGS) == expected
    assert spell("cond_stage_model.transformer.final_layer_norm.bias", dialects.LDM_SPELLINGS) == expected
    assert spell(expected, dialects.LDM_SPELLINGS) == expected
    assert spell("encoder.layers.0.mlp.fc1.bias", dialects.TEXT_ENCODER_SPELLINGS) == "text_model.encoder.layers.0.mlp.fc1.bias"


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout 'comfy' unknown; choose ldm or diffusers"):
        dialects.table(family_model("SD 1").unet, "comfy")
