"""Decide whether a U-Net predicts the noise (eps) or the velocity (v), where its file does not say: ask the model."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from minidiff.conditioning import TextSide
from minidiff.config import ModelConfig
from minidiff.unet import UNet
from weights_loader.families import family_of_config

Prediction = Literal["eps", "v"]
EPS_CORRELATION = 0.5  # an eps-model is near 1, a v-model near 0


@torch.no_grad()
def noise_correlation(unet: UNet, text: TextSide, timesteps: int) -> float:
    """Return how much the U-Net's answer looks like its input, at the highest noise level and with an empty prompt: -1..1.

    There x_t is almost only noise. An eps-model has to name the noise, so it gives its input back; a v-model has to give
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, almost -x_0, of which the input says next to nothing. One call on 16 x 16 latents.

    Args:
        unet: of any number of input channels; an inpainting model is shown a picture that is masked everywhere.
        text: encodes the empty prompt.
        timesteps: how many the schedule has.
    """
    weight = unet.conv_in.weight
    c_in, c_out = unet.config.in_channels, unet.config.out_channels
    x = torch.randn((1, c_in, 16, 16), generator=torch.Generator().manual_seed(0))
    if c_in > c_out:  # inpainting: everything is masked, and nothing of a picture is shown
        x[:, c_out], x[:, c_out + 1 :] = 1.0, 0.0
    x = x.to(weight)
    t = torch.tensor([timesteps - 1], device=weight.device)
    answer = unet(x, t, text([""], (128, 128)))
    return _correlation(x[:, :c_out].float(), answer.float())


def ask_prediction(config: ModelConfig, unet: UNet, text: TextSide) -> tuple[ModelConfig, str]:
    """Find out what a model predicts. Return its config with that, and a note that says how it was decided.

    Args:
        config: the model's, with a guess.
        unet: answers.
        text: encodes the empty prompt.
    """
    correlation = noise_correlation(unet, text, config.schedule.timesteps)
    if not math.isfinite(correlation):
        raise ValueError(
            "the U-Net's answer is not finite: broken weights, or too large for their dtype; prediction= (--prediction) skips the test"
        )
    prediction = "eps" if correlation > EPS_CORRELATION else "v"
    note = (
        f"predicts {prediction}: decided by a numerical test (at the highest noise its answer correlates {correlation:.2f} with its input; "
        "an eps-model is near 1, a v-model near 0); prediction= (--prediction) overrides it"
    )
    return with_prediction(config, prediction), note


def with_prediction(config: ModelConfig, prediction: Prediction) -> ModelConfig:
    """Return the config with another prediction, and with the image size of the family's models that predict it."""
    if prediction == config.schedule.prediction:
        return config
    size = family_of_config(config).image_sizes.get(prediction, config.image_size)
    return replace(config, schedule=replace(config.schedule, prediction=prediction), image_size=size)


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))
