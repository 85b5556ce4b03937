"""When the words matter: prompts that change over the steps, and cross-attention that is kept from a step on.

    step        0   1   2   ...   k   ...                 S-1
    with_spans  "a cat"           | "a dog", or no prompt at all: the unconditional half alone, at half the cost
    with_gate   cross-attention   | its last outputs, kept: no cross-attention, no guidance

The layout of a picture is decided early, and its text matters little afterwards (Balaji et al. 2022, "eDiff-I", figure 2; Zhang et al.
2024, "Cross-attention makes inference cumbersome in text-to-image diffusion models", called TGATE). README.md has the judge's verdict by
the step of the change.

Both give a model for `StableDiffusion.denoise(model=...)`. A step is known by its timestep, so that the second call of a step, which some
samplers make, counts as one of the next step.

Left out: TGATE's self-attention, kept for a few steps before the gate.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.attention import Attention
from minidiff.blocks import TransformerBlock
from minidiff.conditioning import Conditioning, concatenate
from minidiff.pipeline import Model, StableDiffusion
from minidiff.samplers import Level
from minidiff.unet import UNet


@dataclass(frozen=True)
class Span:
    """Another prompt for the steps start..end-1, one for all pictures or one for each.

    None is no prompt and no guidance: the unconditional prediction.
    """

    prompt: str | Sequence[str] | None
    start: int
    end: int


def with_spans(
    sd: StableDiffusion,
    spans: Sequence[Span],
    visited: Sequence[Level],
    size: int | tuple[int, int] | None = None,
    model: Model | None = None,
) -> Model:
    """Return the model with other prompts over some steps; of spans that overlap the last one counts.

    Args:
        sd: the model.
        spans: which prompts, and when.
        visited: the steps + 1 levels of the loop, as Sampling.levels returns them.
        size: of the pictures, as in `StableDiffusion.denoise`.
        model: predicts in the U-Net's place.

    Raises ValueError for a span outside the steps, and from the model for a span of other numbers of prompts than pictures.
    """
    steps, predict = len(visited) - 1, model or sd.predict
    for span in spans:
        if not 0 <= span.start < span.end <= steps:
            raise ValueError(f"span {span.start}..{span.end} of {span.prompt!r}: expected 0 <= start < end <= {steps}, the number of steps")
    with torch.no_grad():
        prompts = [[span.prompt] if isinstance(span.prompt, str) else span.prompt or [""] for span in spans]
        rows = [sd.text(each, sd.pixel_size(size)) for each in prompts]

    def changed(x_t: Float[Tensor, "B C h w"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Tensor:
        i = step_at(visited, t)
        at = next((n for n in reversed(range(len(spans))) if spans[n].start <= i < spans[n].end), None)
        if at is None:
            return predict(x_t, t, conditioning)
        told, B = rows[at] if len(rows[at]) > 1 else rows[at].expand(len(x_t)), len(x_t)
        if len(told) != B:
            raise ValueError(f"a span of {len(told)} prompts for {B} pictures; give one for all, or one for each")
        guided = len(conditioning) == 2 * B
        if spans[at].prompt is None:
            return _once(predict, x_t, t, conditioning[:B] if guided else told, guided)
        return predict(x_t, t, concatenate(conditioning[:B], told) if guided else told)

    return changed


def step_at(visited: Sequence[Level], t: Shaped[Tensor, " B"]) -> int:
    """Return the number of the step that begins nearest to a timestep."""
    at = float(t[0])
    return min(range(len(visited) - 1), key=lambda i: abs(visited[i].t - at))


def _once(predict: Model, x_t: Tensor, t: Tensor, conditioning: Conditioning, guided: bool) -> Tensor:
    """Predict with one half alone; for guidance the same answer twice, so that it changes nothing."""
    answer = predict(x_t, t, conditioning)
    return torch.cat([answer, answer]) if guided else answer


# --- cross-attention that is kept -------------------------------------------------------------------------------------


def with_gate(sd: StableDiffusion, gate: int, visited: Sequence[Level], *, keep: bool = True) -> Model:
    """Return the model without guidance from step `gate` on, its cross-attentions replaced by what they gave at the step before.

    What is kept is the mean of guidance's two halves, as in TGATE. The model is for one run of the loop, from its first step.

    Args:
        sd: the model.
        gate: 1..steps; at `steps` nothing is kept.
        visited: the steps + 1 levels of the loop.
        keep: False leaves the cross-attention to the prompt, so that only guidance ends.

    Raises ValueError for a gate outside the steps.
    """
    steps = len(visited) - 1
    if not 1 <= gate <= steps:
        raise ValueError(f"gate {gate} is outside 1..{steps}; it is the first step that does without")
    kept: dict[str, Tensor] = {}

    def gated(x_t: Float[Tensor, "B C h w"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Tensor:
        i, B = step_at(visited, t), len(x_t)
        guided = len(conditioning) == 2 * B
        if i < gate - 1 or (i < gate and not keep):
            return sd.predict(x_t, t, conditioning)
        if i == gate - 1:
            with _record(sd.unet, kept):
                return sd.predict(x_t, t, conditioning)
        cond = conditioning[B:] if guided else conditioning
        with kept_cross_attention(sd.unet, {name: halves(output, guided) for name, output in kept.items()}):
            return _once(sd.predict, x_t, t, cond, guided)

    return gated


def halves(output: Float[Tensor, "R N D"], guided: bool) -> Float[Tensor, "B N D"]:
    """Return the mean of guidance's two halves, or the output as it is."""
    return torch.stack(output.chunk(2)).mean(dim=0) if guided else output


def _cross_attentions(unet: UNet) -> Iterator[tuple[str, TransformerBlock]]:
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, TransformerBlock))


@contextmanager
def _record(unet: UNet, kept: dict[str, Tensor]) -> Iterator[None]:
    """Put each cross-attention's output into `kept`, as the adapters on it leave it."""
    with ExitStack() as hooks:
        for name, block in _cross_attentions(unet):

            def keep(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                kept[name] = output

            hooks.enter_context(block.cross_attention.register_forward_hook(keep))
        yield


class Kept(nn.Module):
    """Gives the same output whatever it is asked; in other threads it is the attention whose place it takes."""

    def __init__(self, output: Float[Tensor, "B N D"], attention: Attention):
        super().__init__()
        # A parameter, so that a CUDA graph that reads it is known by where it lies.
        self.output = nn.Parameter(output, requires_grad=False)
        self.original, self.thread = (attention,), threading.get_ident()  # in a tuple: no submodule

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L D_context"] | None = None) -> Float[Tensor, "B N D"]:
        return self.output if threading.get_ident() == self.thread else self.original[0](x, context)


@contextmanager
def kept_cross_attention(unet: UNet, outputs: dict[str, Float[Tensor, "B N D"]]) -> Iterator[None]:
    """Replace the cross-attentions of the named transformer blocks by these outputs, while open."""
    blocks = {name: block for name, block in _cross_attentions(unet) if name in outputs}
    attentions = {name: block.cross_attention for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.add_module("cross_attention", Kept(outputs[name], attentions[name]))
        yield
    finally:
        for name, block in blocks.items():
            block.add_module("cross_attention", attentions[name])
