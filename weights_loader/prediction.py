"""Decide what a U-Net predicts, the noise (eps) or the velocity (v), and whether its schedule ends in pure noise (zero terminal SNR).

prediction=, config=, the config that minidiff writes, scheduler_config.json    taken as they are
metadata, marker tensors, a .yaml next to the file                              every spelling in use: stated.py
nothing, or statements that contradict each other                               the numerical test: the model is asked
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.conditioning import TextSide
from minidiff.config import ModelConfig
from minidiff.unet import UNet
from weights_loader.families import family_of_config
from weights_loader.stated import WAY_OUT, Prediction, Statement

EPS_CORRELATION = 0.5  # an eps-model is near 1, a v-model near 0


def apply_statements(config: ModelConfig, found: Sequence[Statement]) -> tuple[ModelConfig, str | None]:
    """Return the config with what the statements say, and where they stand; None if the prediction stays open.

    Raises ValueError for a prediction that is neither eps nor v.
    """
    if other := next((one for one in found if one.prediction not in (None, "eps", "v")), None):
        raise ValueError(f"{other.where}: not supported, expected epsilon or v; {WAY_OUT}")
    said = {one.prediction for one in found if one.prediction}
    if len(said) == 1:
        config = with_prediction(config, "v" if "v" in said else "eps")
    zero = any(one.zero_terminal_snr for one in found)
    config = with_zero_snr(config, zero) if zero else config
    return config, ", ".join(one.where for one in found) if len(said) == 1 else None


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
    """Find out what a model predicts. Return its config with that, and how it was decided.

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
    how = (
        f"a numerical test (at the highest noise its answer correlates {correlation:.2f} with its input; "
        "an eps-model is near 1, a v-model near 0)"
    )
    return with_prediction(config, prediction), how


def with_prediction(config: ModelConfig, prediction: Prediction) -> ModelConfig:
    """Return the config with another prediction, and with the image size of the family's models that predict it."""
    if prediction == config.schedule.prediction:
        return config
    size = family_of_config(config).image_sizes.get(prediction, config.image_size)
    return replace(config, schedule=replace(config.schedule, prediction=prediction), image_size=size)


def with_zero_snr(config: ModelConfig, zero: bool) -> ModelConfig:
    """Return the config with zero terminal SNR or without.

    With it a v-model has the spacing "trailing", which visits the last timestep (Lin et al. 2023, table 2). An eps-model keeps its own: at
    that timestep its x_0 would be divided by 0.
    """
    spacing = "trailing" if zero and config.schedule.prediction == "v" else config.schedule.spacing
    return replace(config, schedule=replace(config.schedule, zero_terminal_snr=zero, spacing=spacing))


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))
