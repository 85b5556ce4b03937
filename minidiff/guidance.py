"""Classifier-free guidance: the model's answer with the prompt, pushed away from its answer without.

    context of "" or of a negative prompt -> U-Net -> uncond --.
                                                               uncond + guidance_scale (cond - uncond) -> sampler
    context of the prompt                 -> U-Net -> cond ----'

Ho and Salimans 2022, in the form of Stable Diffusion's code: guidance_scale here is 1 + w of the paper's eq. 6, so that 1 is
no guidance. A negative prompt takes the place of the empty one. It works on eps and on v alike, and on every channel: one
widely copied implementation leaves out the last of four.

Left out: guidance that changes over the steps, and rescaling of the guided prediction.
"""

from collections.abc import Callable
from math import isfinite

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor


def guide(uncond: Float[Tensor, "B *dims"], cond: Float[Tensor, "B *dims"], guidance_scale: float) -> Float[Tensor, "B *dims"]:
    """uncond + guidance_scale (cond - uncond), on all channels. 0 is uncond, 1 is cond, Stable Diffusion's usual scale 7.5."""
    return uncond + guidance_scale * (cond - uncond)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Float[Tensor, "B L D"],
    uncond_context: Float[Tensor, "B L D"] | None,
    guidance_scale: float,
    shared_prefix: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A model(x_t, t, context) made into the model(x_t, t) that a sampler calls.

    context, uncond_context: what the text encoder gives for the prompts and for the negative (or empty) prompts. Both halves
    run as one batch, the unconditional one first; at guidance_scale 1 the conditional half runs alone, and uncond_context may
    be None. shared_prefix: the model is a U-Net, which is given x_t and t once for both halves and works out once what does not
    depend on the text. Raises ValueError for a guidance_scale that is not finite and for contexts that do not match.
    """
    if not isfinite(guidance_scale):
        raise ValueError(f"guidance_scale {guidance_scale} is not a finite number; 1 is no guidance, 7.5 is usual")
    if guidance_scale == 1:
        return lambda x_t, t: model(x_t, t, context)
    if uncond_context is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs uncond_context, the context of the negative (or empty) prompts")
    if context.shape != uncond_context.shape:
        raise ValueError(
            f"context has shape {tuple(context.shape)} and uncond_context {tuple(uncond_context.shape)}; "
            "give one negative (or empty) prompt a prompt, from the same text encoder"
        )
    both = torch.cat([uncond_context, context])

    def guided_model(x_t: Float[Tensor, "B *dims"], t: Tensor) -> Float[Tensor, "B *dims"]:
        if not shared_prefix:
            x_t, t = repeat(x_t, "b ... -> (two b) ...", two=2), repeat(t, "b -> (two b)", two=2)
        uncond, cond = model(x_t, t, both).chunk(2)
        return guide(uncond, cond, guidance_scale)

    return guided_model
