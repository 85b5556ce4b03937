"""DDIM inversion: from a picture back to the noise that DDIM would make it from.

    x_0 -- eps_hat at x --> x at the next higher level --> ... --> x_T -- DDIM --> x_0, nearly

DDIM is an ODE in steps, so it can be walked the other way (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021, appendix F). Each step
back needs eps_hat at its far end, which is not known yet, and takes that of the near end: exact only in the limit of many steps. Guidance
multiplies the error; invert and reconstruct at scale 1, and edit with more. README.md has the error by steps and scale.

Usual code tells the model the level that x goes to. Here it is told the level where x is, as it was in training; with models that predict v
that comes back nearer.

null_text.py learns an empty prompt for each step, so that guidance reconstructs too.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.guidance import guided
from minidiff.pipeline import StableDiffusion
from minidiff.samplers import Denoiser, Step, levels


def invert(
    sd: StableDiffusion,
    prompts: Sequence[str],
    x_0: Float[Tensor, "B C h w"],
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    spacing: str | None = None,
) -> Iterator[Step]:
    """Walk DDIM's levels upward; yield one Step per step, numbered as on the way back down, so the last one is number 0.

    The x_t of the last Step is the noise, for `StableDiffusion.denoise` to take as x with the same prompts, steps and spacing.

    Args:
        sd: the model.
        prompts: what the pictures show, one for each.
        x_0: their scaled latents (start.encode).
        steps: 1..T, of the way down.
        guidance_scale: of the way up; 1 follows the prompt alone.
        spacing: leading, linspace or trailing; None is the model's own.

    Raises ValueError, before the first step, for arguments outside these.
    """
    if len(prompts) != len(x_0):
        raise ValueError(f"{len(prompts)} prompts for {len(x_0)} pictures; give one for each")
    visited = levels(sd.schedule, "ddim", steps, spacing)
    with torch.no_grad():
        rows = sd.text([*prompts, ""], (x_0.shape[3] * sd.config.vae.factor, x_0.shape[2] * sd.config.vae.factor))
        cond, uncond = rows[:-1], rows[-1:].expand(len(prompts))
    model = guided(sd.predict, cond, uncond, guidance_scale, shared_prefix=True)
    denoise = Denoiser(model, sd.schedule.config.prediction, torch.float32)

    def walk() -> Iterator[Step]:
        x = x_0.float()
        for i, (level, next_level) in enumerate(pairwise(visited[::-1]), start=1):
            x0_hat, eps_hat = denoise(x, level)
            x = next_level.sqrt_alpha_bar * x0_hat + next_level.sqrt_one_minus_alpha_bar * eps_hat
            yield Step(steps - i, next_level.t, x, x0_hat)

    return walk()
