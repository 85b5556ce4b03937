"""A Stable Diffusion of random weights, of the bundled model's shape and smaller, for the tests that need a whole one."""

import dataclasses
from pathlib import Path

import torch

from minidiff.config import ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.two_encoders import text_configs, text_side
from minidiff.unet import UNet
from minidiff.vae import VAE

# The bundled model's vocabulary. A copy, since the core's tests need it also where minidiff/scenes/ is not there.
MERGES = tuple((Path(__file__).parent / "data" / "bpe.txt").read_text(encoding="utf-8").split("\n")[1:])
CONTEXT_LENGTH = 32


def small_config(prediction="v", in_channels=4, image_size=32) -> ModelConfig:
    """Three levels, so that an odd size is rounded on the way down; the last one without attention. 32 pixels are 8 latent cells."""
    return ModelConfig(
        tokenizer=TokenizerConfig(merges=MERGES, context_length=CONTEXT_LENGTH),
        text_encoder=TextEncoderConfig(512 + 2 + len(MERGES), CONTEXT_LENGTH, width=16, layers=2, heads=2),
        unet=UNetConfig(
            in_channels=in_channels,
            widths=(16, 16, 32),
            blocks_per_level=1,
            attention=(True, True, False),
            heads=(2, 2, 4),
            context_width=16,
            groups=8,
        ),
        vae=VAEConfig(widths=(8, 8, 16), blocks_per_level=1, groups=4),
        schedule=ScheduleConfig(prediction=prediction, zero_terminal_snr=prediction == "v", spacing="trailing"),
        image_size=image_size,
        guidance_scale=4.0,
    )


def xl_config() -> ModelConfig:
    """SDXL in small: two encoders, a pooled vector, no transformers at the first level and deeper ones further down."""
    config = small_config("eps")
    second = dataclasses.replace(config.tokenizer, cleaning="open_clip", padding="zero")
    text = dataclasses.replace(config.text_encoder, layers=3, penultimate=True)
    return dataclasses.replace(
        config,
        text_encoder=text,
        tokenizer_2=second,
        text_encoder_2=dataclasses.replace(text, width=24, heads=3, activation="gelu", projection=20),
        unet=dataclasses.replace(config.unet, attention=(0, 1, 2), context_width=16 + 24, linear_projection=True, pooled_width=20),
        vae=dataclasses.replace(config.vae, scaling_factor=0.13025),
        schedule=ScheduleConfig(),
    )


def wider_config() -> ModelConfig:
    """With a wider text, so that no file for the small model fits."""
    config = small_config()
    return dataclasses.replace(
        config,
        text_encoder=dataclasses.replace(config.text_encoder, width=24),
        unet=dataclasses.replace(config.unet, context_width=24),
    )


def training_config() -> ModelConfig:
    """Smaller still, for the pixels of the scenes: what a training step computes is the same at every size."""
    from minidiff.scenes.scenes import SIZE  # here, so that the core is tested without its extensions

    config = small_config(image_size=SIZE)
    return dataclasses.replace(
        config,
        text_encoder=dataclasses.replace(config.text_encoder, layers=1),
        unet=dataclasses.replace(config.unet, widths=(16, 16), attention=(True, False), heads=(2, 2)),
        vae=VAEConfig(widths=(4, 4, 8, 8), blocks_per_level=1, groups=4),
    )


def small_model(config: ModelConfig | None = None, seed=0) -> StableDiffusion:
    """Its pictures use the whole range of brightness, and the prompt changes them."""
    config = config or small_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoders = {name: TextEncoder(numbers) for name, (_, numbers) in text_configs(config).items()}
        sd = StableDiffusion(config, text_side(config, encoders), UNet(config.unet), VAE(config.vae))
    with torch.no_grad():
        sd.unet.conv_out.weight.mul_(4)
        sd.vae.decoder.conv_out.weight.mul_(2)
    return sd
