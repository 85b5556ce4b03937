"""The configurations: Stable Diffusion's numbers, and what cannot be built is refused with the number that is wrong."""

import dataclasses

import pytest
import torch
from jaxtyping import TypeCheckError

from minidiff.config import SD1, SD2, ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.text_encoder import TextEncoder
from minidiff.unet import UNet

ALL = (TokenizerConfig, TextEncoderConfig, UNetConfig, VAEConfig, ScheduleConfig, ModelConfig)


def test_the_defaults_are_stable_diffusion_1():
    assert ModelConfig(TokenizerConfig(), TextEncoderConfig(), UNetConfig(), VAEConfig(), ScheduleConfig(), 512, 7.5) == SD1
    assert SD1.schedule.prediction == "eps" and SD1.vae.scaling_factor == 0.18215
    assert SD1.tokenizer.padding == "end" and SD1.text_encoder.activation == "quick_gelu"


def test_stable_diffusion_2_differs_only_where_its_authors_say():
    assert SD2.vae == SD1.vae
    assert dataclasses.replace(SD2.unet, heads=(8, 8, 8, 8), context_width=768, linear_projection=False) == SD1.unet
    assert {width // heads for width, heads in zip(SD2.unet.widths, SD2.unet.heads)} == {64}
    assert SD2.text_encoder.activation == "gelu" and SD2.tokenizer.padding == "zero" and SD2.schedule.prediction == "v"


@pytest.mark.parametrize("config", [SD1, SD2], ids=["SD 1", "SD 2"])
def test_the_parts_of_a_family_fit_together(config):
    assert config.text_encoder.width == config.unet.context_width
    assert config.text_encoder.context_length == config.tokenizer.context_length
    assert config.vae.latent_channels == config.unet.in_channels == config.unet.out_channels
    assert config.image_size % config.vae.factor == 0
    with torch.device("meta"):
        words = TextEncoder(config.text_encoder)(torch.zeros(1, 77, dtype=torch.int64))
        assert UNet(config.unet)(torch.zeros(1, 4, 8, 8), torch.zeros(1), words).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("kind", ALL)
def test_a_config_cannot_be_changed_and_works_as_a_key(kind):
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    assert {config: "found"}[kind()] == "found"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UNetConfig(widths=()), "UNetConfig: widths is empty; give one width per resolution level"),
        (lambda: VAEConfig(widths=()), "VAEConfig: widths is empty"),
        (lambda: UNetConfig(widths=(320, 640, 1280, 1270)), "UNetConfig: width 1270 does not divide into 32 normalisation groups"),
        (lambda: VAEConfig(widths=(128, 250)), "VAEConfig: width 250 does not divide into 32 normalisation groups"),
        (lambda: UNetConfig(heads=(8, 8)), r"UNetConfig: heads \(8, 8\), widths \(320, 640, 1280, 1280\); give one of each per level"),
        (lambda: UNetConfig(attention=(1,)), r"UNetConfig: attention \(1,\), widths \(320, 640, 1280, 1280\); give one of each per level"),
        (lambda: UNetConfig(heads=(8, 8, 8, 7)), "UNetConfig: width 1280 does not divide into 7 heads"),
        (lambda: TextEncoderConfig(width=768, heads=11), "TextEncoderConfig: width 768 does not divide into 11 heads"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_activation_is_refused_with_the_choices():
    with pytest.raises(TypeCheckError):  # in the tests, by its annotation
        TextEncoderConfig(activation="relu")
    config = TextEncoderConfig()
    object.__setattr__(config, "activation", "relu")  # elsewhere annotations are not checked
    with pytest.raises(ValueError, match="TextEncoderConfig: activation 'relu' unknown; choose quick_gelu, gelu"):
        config.__post_init__()
