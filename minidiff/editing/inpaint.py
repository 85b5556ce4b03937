"""Inpainting: a part of a picture is repainted under a prompt, and the rest stays.

    a U-Net of the latent:  after each step, outside the hole:  x_t <- add_noise(x_0, the seed's noise, level)
    a U-Net of 9 channels:  x_t, the hole, the latent of the picture without it --> U-Net

With any model the known part can be put back after every step, as noisy as the rest, so that what grows in the hole has it in view. The
noise is the same in every step: the known part then follows the trajectory that leads to the picture. README.md has it measured beside
other ways. A model of 9 channels was trained for the task (Rombach et al. 2022, section 4.5, in the form of Stable Diffusion's inpainting
models): it is told the mask and the picture with the hole in mid-grey, in that order, and nothing is put back.

Papers: Lugmayr et al. 2022, "RePaint", eq. 8 (with fresh noise, and resampling, which is left out); Avrahami et al. 2022, "Blended latent
diffusion" (blending).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.conditioning import Conditioning
from minidiff.editing.image_to_image import unchanged
from minidiff.editing.masks import Mask, check_mask, cover_cells, to_cells
from minidiff.editing.start import Sampling, Steer, add_noise, encode, encode_rows, find_start, first_noise
from minidiff.pipeline import Model, StableDiffusion, pair_prompts
from minidiff.samplers import Level, Step

Known = Callable[[int], Tensor]  # the known latents after step i


def inpaint(
    sd: StableDiffusion,
    prompts: str | Sequence[str],
    pixels: Float[Tensor, "P 3 H W"],
    mask: Float[Tensor, "1 1 H_mask W_mask"],
    *,
    strength: float = 1.0,
    seeds: Sequence[int] = (0,),
    sampling: Sampling = Sampling(),
    steer: Steer | None = None,
) -> Generator[Step, Tensor | None, None]:
    """Repaint the masked part; yield and take what `StableDiffusion.denoise` does. The result is to be pasted (masks.py).

    Args:
        sd: the model, of 4 or 9 channels.
        prompts: one per picture, or a single one for all seeds.
        pixels: in [-1, 1], a picture for each prompt or seed, or a single one; sides are multiples of the VAE's factor.
        mask: of the pictures' size, 1 where they are repainted; grown to whole latent cells.
        strength: 0..1, how much of what the hole showed is replaced by noise at the start.
        seeds: one per picture, or a single one for all prompts.
        sampling: steps, sampler and the like.
        steer: changes the model that is asked, as by ControlNets, which see 4 channels of 9.

    Raises ValueError, before the first step, for a mask of another size or all of one value, and for what the model cannot do.
    """
    prompts, seeds = pair_prompts(prompts, seeds)
    if mask.shape[2:] != pixels.shape[2:]:
        raise ValueError(f"the mask is {size_of(mask)} pixels, the picture {size_of(pixels)}; give a mask of the picture's size")
    check_mask(mask)
    start = find_start(sd.schedule, strength, sampling)
    mask = mask.to(sd.device)
    x_0 = encode_rows(sd, pixels, len(prompts))
    if start.index == start.steps:
        return unchanged(x_0, start.steps)
    noise, cells = first_noise(seeds, x_0), to_cells(mask, sd.config.vae.factor)
    x = None if strength == 1 else add_noise(x_0, start.level, noise)
    if sd.config.unet.in_channels == 2 * x_0.shape[1] + 1:
        model = with_hole(sd, pixels.to(sd.device), cover_cells(mask, sd.config.vae.factor))
        return sampling.denoise(sd, prompts, seeds, x_0, start.index, x, steer(model) if steer else model)
    known = same_noise(x_0, noise, sampling.levels(sd.schedule))
    model = steer(sd.predict) if steer else None
    return keep_known(sampling.denoise(sd, prompts, seeds, x_0, start.index, x, model), known, cells)


def size_of(pixels: Float[Tensor, "B C H W"]) -> str:
    """Format the size of pixels as "64 x 48"."""
    return f"{pixels.shape[3]} x {pixels.shape[2]}"


def same_noise(x_0: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"], visited: Sequence[Level]) -> Known:
    """Return the known latents by the step that they follow: x_0 with the same noise at each level, and without any after the last step."""
    return lambda i: x_0 if i + 2 == len(visited) else add_noise(x_0, visited[i + 1], noise)


def keep_known(
    trajectory: Generator[Step, Tensor | None, None], known: Known, cells: Float[Tensor, "1 1 h w"]
) -> Generator[Step, Tensor | None, None]:
    """Run a denoising loop, and after each step replace the latents where `cells` is 0 by the known ones."""
    send = None
    while True:
        try:
            step = trajectory.send(send)
        except StopIteration:
            return
        x_t = cells * step.x_t + (1 - cells) * known(step.i)
        sent = yield replace(step, x_t=x_t)
        send = x_t if sent is None else sent


def with_hole(sd: StableDiffusion, pixels: Float[Tensor, "P 3 H W"], mask: Mask) -> Model:
    """Return the model of 9 channels as one of 4: it is also told which cells are to be repainted, and the picture without them."""
    cells = to_cells(mask, sd.config.vae.factor)
    masked = encode(sd, pixels * (mask < 0.5))  # 0 is mid-grey

    def model(x_t: Float[Tensor, "B C h w"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Tensor:
        told = (part.to(x_t).expand(len(x_t), *part.shape[1:]) for part in (cells, masked))
        return sd.predict(torch.cat([x_t, *told], dim=1), t, conditioning)

    return model
