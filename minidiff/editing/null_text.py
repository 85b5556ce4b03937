"""Null-text inversion: an empty prompt for each step, learned so that guidance leads back to the picture it was inverted from.

    invert at scale 1:    x_0 = z_S <- ... <- z_1 <- z_0                       a trajectory that scale 1 follows, and guidance leaves
    at step i:            minimize |z_(i+1) - DDIM step(z'_i, empty_i, prompt, scale)|^2 over empty_i, then take the step

Only the context of the empty prompt is learned, so the picture can be edited by its prompt afterwards, with the model as it is. Mokady et
al. 2023, "Null-text inversion for editing real images using guided diffusion models", algorithm 1, with the numbers of the authors' code:
Adam, up to 10 iterations a step, a learning rate of 0.01 that falls by a hundredth of that with each step, and a goal that is 2e-5 looser
with each step. Each step starts from the last one's result. Gradients through the U-Net need float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.conditioning import Conditioning
from minidiff.guidance import guide
from minidiff.pipeline import Model, StableDiffusion
from minidiff.samplers import Denoiser, Level, Step, levels

RATE, RATE_FALL = 1e-2, 1 / 100  # Adam's learning rate at step i is RATE (1 - RATE_FALL i), at least 0
GOAL, GOAL_RISE = 1e-5, 2e-5  # step i is done below GOAL + GOAL_RISE i, in squared latents


@dataclass(frozen=True, eq=False)
class NullTextStep:
    """A step with its learned empty prompts.

    i, t: its number and the timestep at which it begins. empty: one context per picture. x_t: the latents after the step.
    error: their largest mean squared difference from the inversion's. iterations: the most that a picture took.
    """

    i: int
    t: int | float
    empty: Float[Tensor, "B L D"]
    x_t: Float[Tensor, "B C h w"]
    error: float
    iterations: int


def null_text(
    sd: StableDiffusion,
    prompts: Sequence[str],
    x_0: Float[Tensor, "B C h w"],
    inverted: Sequence[Step],
    *,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    spacing: str | None = None,
    iterations: int = 10,
) -> Iterator[NullTextStep]:
    """Learn an empty prompt for each step, from the first to the last; each picture by itself, whatever the batch.

        up = list(invert(sd, prompts, x_0))
        learned = list(null_text(sd, prompts, x_0, up))
        sd.denoise(prompts, steps=len(up), x=up[-1].x_t, model=with_empty_prompts(sd.predict, learned))

    Args:
        sd: the model, in float32.
        prompts: what the pictures show, one for each, as `invert` was given them.
        x_0: their scaled latents.
        inverted: all steps of `invert` at scale 1.
        guidance_scale: of the way down; None is the model's own.
        negative_prompt: what learning starts from in place of the empty prompt.
        spacing: as `invert` was given it.
        iterations: of Adam, at most, for each step.

    Raises ValueError, before the first step, for a model in half precision, guidance_scale 1, and no iterations.
    """
    scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    if sd.dtype.itemsize < 4:
        raise ValueError(f"null-text inversion needs gradients in float32, and the model is in {sd.dtype}; load it with dtype float32")
    if scale == 1:
        raise ValueError("guidance_scale 1 does not look at the empty prompt, and inversion comes back without; give a larger scale")
    if iterations < 1:
        raise ValueError(f"iterations {iterations}: give at least 1")
    if len(prompts) != len(x_0):
        raise ValueError(f"{len(prompts)} prompts for {len(x_0)} pictures; give one for each")
    visited = levels(sd.schedule, "ddim", len(inverted), spacing)
    targets = [x_0.float(), *(step.x_t.float() for step in inverted)][::-1]
    factor = sd.config.vae.factor
    with torch.no_grad():
        cond, uncond = sd.text.guided(list(prompts), negative_prompt, (x_0.shape[3] * factor, x_0.shape[2] * factor))

    def learn() -> Iterator[NullTextStep]:
        x, empty = targets[0], uncond.context.clone()
        for i, (level, next_level) in enumerate(pairwise(visited)):
            step = _GuidedStep(sd, level, next_level, scale)
            pictures = [slice(b, b + 1) for b in range(len(x))]
            learned = [
                _learn(step, x[b], cond[b], replace(uncond[b], context=empty[b]), targets[i + 1][b], i, iterations) for b in pictures
            ]
            empty, x = torch.cat([one[0] for one in learned]), torch.cat([one[1] for one in learned])
            error = (x - targets[i + 1]).square().mean(dim=(1, 2, 3)).max().item()
            yield NullTextStep(i, level.t, empty, x, error, max(one[2] for one in learned))

    return learn()


@dataclass(frozen=True)
class _GuidedStep:
    """A step of DDIM under guidance, with gradients."""

    sd: StableDiffusion
    level: Level
    next_level: Level
    scale: float

    def predict(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        t = torch.full((len(x_t),), self.level.t, device=x_t.device)
        return self.sd.unet(x_t.to(self.sd.dtype), t, conditioning).to(x_t.dtype)

    def take(self, x_t: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
        denoiser = Denoiser(self.sd.unet, self.sd.schedule.config.prediction, x_t.dtype)
        x0_hat, eps_hat = denoiser.to_x0_eps(guide(uncond, cond, self.scale), x_t, self.level)
        return self.next_level.sqrt_alpha_bar * x0_hat + self.next_level.sqrt_one_minus_alpha_bar * eps_hat


def _learn(
    step: _GuidedStep, x_t: Tensor, cond: Conditioning, uncond: Conditioning, target: Tensor, i: int, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Return the learned context of the empty prompt, the latent after the step, and the iterations taken."""
    with torch.no_grad():
        told = step.predict(x_t, cond)
    empty, taken = uncond.context.detach().clone().requires_grad_(), 0
    adam = torch.optim.Adam([empty], lr=max(0.0, RATE * (1 - RATE_FALL * i)))
    with torch.enable_grad():
        while taken < iterations:
            x_next = step.take(x_t, step.predict(x_t, replace(uncond, context=empty)), told)
            loss = F.mse_loss(x_next, target)
            (empty.grad,) = torch.autograd.grad(loss, [empty])
            adam.step()
            taken += 1
            if loss.item() < GOAL + GOAL_RISE * i:
                break
    empty = empty.detach()
    with torch.no_grad():
        return empty, step.take(x_t, step.predict(x_t, replace(uncond, context=empty)), told), taken


def with_empty_prompts(model: Model, learned: Sequence[NullTextStep]) -> Model:
    """Return the model with the learned contexts in place of the empty prompt's: `model=` of StableDiffusion.denoise, for DDIM.

    For B pictures it takes B rows, or a multiple in which the pictures repeat, as prompt_to_prompt's originals and edits. Raises ValueError
    for a timestep at which nothing was learned, for another number of rows, and without guidance.
    """
    by_t = {step.t: step.empty for step in learned}

    def told(x_t: Float[Tensor, "R C h w"], t: Shaped[Tensor, " R"], conditioning: Conditioning) -> Tensor:
        if (at := t[0].item()) not in by_t:
            raise ValueError(f"no empty prompt was learned for t = {at:g}; take the inversion's steps and spacing, and the sampler ddim")
        empty, rows = by_t[at].to(conditioning.context), len(x_t)
        if len(conditioning) != 2 * rows or rows % len(empty):
            raise ValueError(
                f"{rows} rows of x_t and {len(conditioning)} of context for {len(empty)} inverted pictures; guide the same pictures"
            )
        context = torch.cat([empty.repeat(rows // len(empty), 1, 1), conditioning.context[rows:]])
        return model(x_t, t, replace(conditioning, context=context))

    return told
