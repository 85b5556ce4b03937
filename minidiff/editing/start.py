"""Where an edit starts: a picture as a latent, noised to the level that a strength asks for.

    pixels -> VAE encoder -> x_0 ---.
    seed   -> eps -----------------+--> x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps -> the denoising loop from there
    strength -> level -------------'

A strength of 0.6 asks for the noise of timestep 0.6 (T - 1), whatever the sampler, the spacing and the number of steps; the loop starts at
the nearest of the levels that it visits anyway. (Other programs count steps instead, so that the noise depends on the sampler: README.md.)
The noise is the first that the seed gives, the same as in text to image.

Papers: Meng et al. 2022, "SDEdit"; Ho et al. 2020, eq. 4.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.pipeline import Model, StableDiffusion, noise_source
from minidiff.samplers import Level, Step, levels
from minidiff.schedule import NoiseSchedule

Steer = Callable[[Model], Model]  # the model that an edit asks, changed: `lambda model: controlled(model, [...])` adds ControlNets


@dataclass(frozen=True)
class Sampling:
    """How the denoising loop runs: those arguments of `StableDiffusion.denoise` that an edit passes on as they are, explained there."""

    steps: int = 30
    sampler: str = "ddim"
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    spacing: str | None = None
    eta: float = 0.0

    def levels(self, schedule: NoiseSchedule) -> list[Level]:
        """Return the steps + 1 noise levels of the loop. Raises ValueError for what the sampler cannot do."""
        return levels(schedule, self.sampler, self.steps, self.spacing)

    def denoise(
        self,
        sd: StableDiffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        like: Float[Tensor, "B C h w"],
        start: int = 0,
        x: Float[Tensor, "B C h w"] | None = None,
        model: Model | None = None,
    ) -> Generator[Step, Tensor | None, None]:
        """Call `sd.denoise` with these settings.

        Args:
            sd: the model.
            prompts, seeds, start, x, model: as in `StableDiffusion.denoise`.
            like: latents of the pictures' size.
        """
        factor = sd.config.vae.factor
        return sd.denoise(
            prompts,
            steps=self.steps,
            sampler=self.sampler,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            seeds=seeds,
            size=(like.shape[3] * factor, like.shape[2] * factor),
            spacing=self.spacing,
            eta=self.eta,
            start=start,
            x=x,
            model=model,
        )


@dataclass(frozen=True)
class Start:
    """The level at which an edit starts: number `index` of the loop's; index == steps leaves no step to take."""

    index: int
    steps: int
    level: Level

    def __str__(self) -> str:
        return f"begins at t = {self.level.t:.0f}: {self.steps - self.index} of {self.steps} steps"


def find_start(schedule: NoiseSchedule, strength: float, sampling: Sampling) -> Start:
    """Return the visited level nearest to timestep strength (T - 1); 1 is the first, 0 the end, and anything between takes a step at least.

    Raises ValueError for a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is outside 0..1; 0 leaves the picture as it is, 1 replaces it")
    visited = sampling.levels(schedule)
    if strength in (0, 1):
        index = 0 if strength == 1 else sampling.steps
    else:
        wanted = strength * (schedule.config.timesteps - 1)
        index = min(range(sampling.steps), key=lambda i: abs(visited[i].t - wanted))
    return Start(index, sampling.steps, visited[index])


@torch.no_grad()
def encode(sd: StableDiffusion, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """Encode pixels in [-1, 1] to scaled latents, float32: the posterior's mean, so that nothing is random.

    Raises ValueError for sides that are no multiples of the VAE's factor, and where half precision overflows.
    """
    x_0 = sd.vae.encode(pixels.to(sd.device, sd.vae.quant_conv.weight.dtype)).mean.float() * sd.config.vae.scaling_factor
    if not x_0.isfinite().all():
        raise ValueError(f"the encoder overflowed in {sd.vae.quant_conv.weight.dtype}; load the model in float32 or bfloat16")
    return x_0


def encode_rows(sd: StableDiffusion, pixels: Float[Tensor, "P 3 H W"], rows: int) -> Float[Tensor, "B C h w"]:
    """Encode as many pictures as rows, or a single one for all rows. Raises ValueError for other numbers of them."""
    if len(pixels) not in (1, rows):
        raise ValueError(f"{len(pixels)} pictures for {rows} prompts and seeds; give one picture for all, or one for each")
    x_0 = encode(sd, pixels)
    return x_0.expand(rows, *x_0.shape[1:])


def first_noise(seeds: Sequence[int], x_0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Return the noise that text to image starts from on these seeds."""
    _, channels, height, width = x_0.shape
    return noise_source(seeds, (channels, height, width), x_0.device)()


def add_noise(x_0: Float[Tensor, "B C h w"], level: Level, eps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Compute x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps at a level, which may lie between two timesteps (DDPM eq. 4)."""
    return level.sqrt_alpha_bar * x_0 + level.sqrt_one_minus_alpha_bar * eps
