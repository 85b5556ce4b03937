"""Image to image: a picture is noised part of the way, and denoised from there under a prompt.

    picture -> x_0 -> x_t at the start level -> the denoising loop's remaining steps -> a picture of the same layout, as the prompt says

The more noise, the less is left of the picture: large shapes and colours go last (Meng et al. 2022, "SDEdit", section 3). Left out: the
posterior's random sample in place of its mean, and noise added along the way.
"""

from collections.abc import Generator, Sequence

from jaxtyping import Float
from torch import Tensor

from minidiff.editing.start import Sampling, Steer, add_noise, encode_rows, find_start, first_noise
from minidiff.pipeline import StableDiffusion, pair_prompts
from minidiff.samplers import Step


def image_to_image(
    sd: StableDiffusion,
    prompts: str | Sequence[str],
    pixels: Float[Tensor, "P 3 H W"],
    *,
    strength: float = 0.5,
    seeds: Sequence[int] = (0,),
    sampling: Sampling = Sampling(),
    steer: Steer | None = None,
) -> Generator[Step, Tensor | None, None]:
    """Denoise from a noised picture; yield and take what `StableDiffusion.denoise` does.

    At strength 1 that is text to image on the same seeds, at strength 0 a single Step with the encoded picture, without a model call.

    Args:
        sd: the model.
        prompts: one per picture, or a single one for all seeds.
        pixels: in [-1, 1], a picture for each prompt or seed, or a single one; sides are multiples of the VAE's factor.
        strength: 0..1, how much noise, as a share of the T timesteps.
        seeds: one per picture, or a single one for all prompts.
        sampling: steps, sampler and the like.
        steer: changes the model that is asked, as by ControlNets.

    Raises ValueError, before the first step, for what the model cannot do.
    """
    prompts, seeds = pair_prompts(prompts, seeds)
    start = find_start(sd.schedule, strength, sampling)
    x_0 = encode_rows(sd, pixels, len(prompts))
    if start.index == start.steps:
        return unchanged(x_0, start.steps)
    # At strength 1 the loop draws the noise itself: the first level may keep a trace of the picture.
    x = None if strength == 1 else add_noise(x_0, start.level, first_noise(seeds, x_0))
    return sampling.denoise(sd, prompts, seeds, x_0, start.index, x, steer(sd.predict) if steer else None)


def unchanged(x_0: Float[Tensor, "B C h w"], steps: int) -> Generator[Step, Tensor | None, None]:
    """Yield the latents as the only Step, numbered as the one after the last, so that callers need no special case."""
    yield Step(steps, 0, x_0, x_0)
