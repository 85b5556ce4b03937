"""Classifier-free guidance: the model's answer with the prompt, pushed away from its answer without.

    context of "" or of a negative prompt -> U-Net -> uncond --.
                                                               uncond + guidance_scale (cond - uncond) -> sampler
    context of the prompt                 -> U-Net -> cond ----'

Ho and Salimans 2022, in the form of Stable Diffusion's code: guidance_scale here is 1 + w of the paper's eq. 6, so that 1 is
no guidance. A negative prompt takes the place of the empty one. Guidance works on eps and on v alike, and on every channel: one
widely copied implementation leaves out the last of four.

Left out: guidance that changes over the steps, and rescaling of the guided prediction.
"""

from collections.abc import Callable
from math import isfinite

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from minidiff.conditioning import Conditioning, as_conditioning, concatenate


def guide(uncond: Float[Tensor, "B *dims"], cond: Float[Tensor, "B *dims"], guidance_scale: float) -> Float[Tensor, "B *dims"]:
    """Compute uncond + guidance_scale (cond - uncond), on all channels. 0 is uncond, 1 is cond, Stable Diffusion's usual scale 7.5."""
    return uncond + guidance_scale * (cond - uncond)


def guided(
    model: Callable[..., Tensor],
    context: Float[Tensor, "B L D"] | Conditioning,
    uncond_context: Float[Tensor, "B L D"] | Conditioning | None,
    guidance_scale: float,
    shared_prefix: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a model(x_t, t, context) into the model(x_t, t) that a sampler calls.

    Both halves run as one batch, the unconditional one first; at guidance_scale 1 the conditional half runs alone.

    Args:
        model: model(x_t, t, context) -> prediction; its context is a tensor or a Conditioning, whichever is given here.
        context: what the text encoder gives for the prompts, (B, L, D), or a Conditioning of B rows.
        uncond_context: the same for the negative (or empty) prompts; may be None at guidance_scale 1.
        guidance_scale: any finite number; 1 is no guidance.
        shared_prefix: whether the model takes B rows of x_t and t for 2 B of context, as a U-Net does: it then computes only once what does
            not depend on the text, which changes its answer by rounding alone.

    Raises ValueError for a guidance_scale that is not finite and for contexts that do not match.
    """
    if not isfinite(guidance_scale):
        raise ValueError(f"guidance_scale {guidance_scale} is not a finite number; 1 is no guidance, 7.5 is usual")
    if guidance_scale == 1:
        return lambda x_t, t: model(x_t, t, context)
    if uncond_context is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs uncond_context, the context of the negative (or empty) prompts")
    both = concatenate(as_conditioning(uncond_context), as_conditioning(context))
    given = both if isinstance(context, Conditioning) else both.context

    def guided_model(x_t: Float[Tensor, "B *dims"], t: Tensor) -> Float[Tensor, "B *dims"]:
        if not shared_prefix:
            x_t, t = repeat(x_t, "b ... -> (two b) ...", two=2), repeat(t, "b -> (two b)", two=2)
        uncond, cond = model(x_t, t, given).chunk(2)
        return guide(uncond, cond, guidance_scale)

    return guided_model
