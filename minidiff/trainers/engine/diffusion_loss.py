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

from minidiff.conditioning import Conditioning
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.loop import randn_per_sample
from minidiff.transfer import to_device

OFFSET_NOISE = 0.1  # the size that the blog post, and every trainer after it, uses


@dataclass(frozen=True)
class NoiseSample:
    """The random part of each sample: its timestep and its noise."""

    t: Int[Tensor, " B"]
    eps: Float[Tensor, "B C h w"]


def sample_noise(
    rngs: Sequence[np.random.Generator], shape: Sequence[int], timesteps: int, device: torch.device, offset_noise: float = 0.0
) -> NoiseSample:
    """Draw a timestep and unit normal noise for each sample, from its own generator.

    Args:
        rngs: a generator per sample
        shape: of one latent, (C, h, w)
        timesteps: t is one of 0..timesteps-1, each as likely
        device: where the result is
        offset_noise: this much times one normal value per channel is added, so that a model learns to make all of a picture darker or
            brighter
    """
    t = torch.tensor([int(rng.integers(timesteps)) for rng in rngs])
    eps = randn_per_sample(rngs, shape)
    if offset_noise:
        eps = eps + offset_noise * randn_per_sample(rngs, (shape[0], 1, 1))
    return NoiseSample(to_device(device, t), to_device(device, eps))


def squared_error(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "B C h w"],
    context: Float[Tensor, "B L D"] | Conditioning,
    noise: NoiseSample,
) -> Float[Tensor, "B C h w"]:
    """Return (prediction - target)^2 at x_t, in float32. The target is eps or v, as the schedule's config says.

    Args:
        unet: unet(x_t, t, context)
        schedule: of the noise
        x_0: scaled latents
        context: of their captions, or all that the U-Net is told
        noise: timestep and eps of each
    """
    x_t = schedule.q_sample(x_0, noise.t, noise.eps)
    prediction = unet(x_t, noise.t, context)
    return (prediction.float() - schedule.target(x_0, noise.t, noise.eps)).square()


def diffusion_loss(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "B C h w"],
    context: Float[Tensor, "B L D"] | Conditioning,
    noise: NoiseSample,
    *,
    mask: Float[Tensor, "B 1 h w"] | None = None,
    min_snr: float | None = None,
) -> Float[Tensor, " B"]:
    """Return the loss of each sample: the mean of its squared error, over the cells of its mask if there is one.

    Args:
        unet, schedule, x_0, context, noise: as in squared_error
        mask: 1 in the latent cells whose loss counts
        min_snr: the gamma of min-SNR weighting (the paper's 5), which keeps almost clean timesteps from counting most
    """
    error = squared_error(unet, schedule, x_0, context, noise).mean(dim=1, keepdim=True)
    if mask is None:
        loss = error.mean(dim=(1, 2, 3))
    else:
        loss = (mask * error).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    if min_snr is not None:
        loss = loss * min_snr_weight(schedule, noise.t, min_snr)
    return loss


def min_snr_weight(schedule: NoiseSchedule, t: Int[Tensor, " B"], gamma: float) -> Float[Tensor, " B"]:
    """Return min(snr, gamma) / snr where eps is predicted, min(snr, gamma) / (snr + 1) for v (Hang et al. 2023, section 3.4)."""
    snr = schedule.snr(t)
    if schedule.config.prediction == "eps":
        return (gamma / snr).clamp(max=1.0)  # the same, and 1 where the SNR is 0
    return snr.clamp(max=gamma) / (snr + 1)
