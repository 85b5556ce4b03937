"""The loss of latent diffusion: how far the U-Net's answer at a noisy latent is from the noise, or the velocity, that was put in.

    x_0, t, eps -> q_sample -> x_t -> U-Net(x_t, t, context) -> (prediction - target)^2 -> mean, maybe masked and weighted

Papers: Rombach et al. 2022, eq. 3; Salimans and Ho 2022 (v); Hang et al. 2023, "Efficient diffusion training via min-SNR weighting
strategy". Offset noise is Guttenberg's (crosslabs.org, 2023, "Diffusion with offset noise").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.loop import normals, on

OFFSET_NOISE = 0.1  # the size that the blog post, and every trainer after it, uses


@dataclass(frozen=True)
class Draws:
    """What is drawn for each sample: its timestep and its noise."""

    t: Int[Tensor, " B"]
    eps: Float[Tensor, "B C h w"]


def draw(
    rngs: Sequence[np.random.Generator], shape: Sequence[int], timesteps: int, device: torch.device, offset_noise: float = 0.0
) -> Draws:
    """A timestep, each of 0..timesteps-1 as likely, and unit normal noise of shape (C, h, w), from each sample's own generator.

    offset_noise adds so much times one normal value a channel, which teaches a model to make all of a picture darker or brighter.
    """
    t = torch.tensor([int(rng.integers(timesteps)) for rng in rngs])
    eps = normals(rngs, shape)
    if offset_noise:
        eps = eps + offset_noise * normals(rngs, (shape[0], 1, 1))
    return Draws(on(device, t), on(device, eps))


def squared_error(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "B C h w"],
    context: Float[Tensor, "B L D"],
    draws: Draws,
) -> Float[Tensor, "B C h w"]:
    """(prediction - target)^2 at x_t, in float32; x_0: scaled latents. The target is eps or v, as the schedule's config says."""
    x_t = schedule.q_sample(x_0, draws.t, draws.eps)
    prediction = unet(x_t, draws.t, context)
    return (prediction.float() - schedule.target(x_0, draws.t, draws.eps)).square()


def diffusion_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "B C h w"],
    context: Float[Tensor, "B L D"],
    draws: Draws,
    *,
    mask: Float[Tensor, "B 1 h w"] | None = None,
    min_snr: float | None = None,
) -> Float[Tensor, " B"]:
    """The loss of each sample: the mean of its squared error, over the cells of its mask if there is one.

    min_snr: the gamma of min-SNR weighting (the paper's 5), which keeps almost clean timesteps from counting most.
    """
    error = squared_error(unet, schedule, x_0, context, draws).mean(dim=1, keepdim=True)
    if mask is None:
        loss = error.mean(dim=(1, 2, 3))
    else:
        loss = (mask * error).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    if min_snr is not None:
        loss = loss * min_snr_weight(schedule, draws.t, min_snr)
    return loss


def min_snr_weight(schedule: NoiseSchedule, t: Int[Tensor, " B"], gamma: float) -> Float[Tensor, " B"]:
    """min(snr, gamma) / snr where eps is predicted, min(snr, gamma) / (snr + 1) for v (Hang et al. 2023, section 3.4)."""
    snr = schedule.snr(t)
    if schedule.config.prediction == "eps":
        return (gamma / snr).clamp(max=1.0)  # the same, and 1 where the SNR is 0
    return snr.clamp(max=gamma) / (snr + 1)
