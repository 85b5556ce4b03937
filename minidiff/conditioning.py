"""Conditioning: what the U-Net is told besides the noisy latent and the timestep.

    prompts -> TextSide (tokenizer, text encoder) -> Conditioning -> guidance -> UNet(x_t, t, conditioning)

For Stable Diffusion 1 and 2 that is the context alone, one vector per token. SDXL adds a pooled vector of the whole prompt and the sizes
of the picture (Podell et al. 2023, "SDXL", section 2.2); a ControlNet adds residuals to what the U-Net hands from its way down to its way
up (Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models").
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.transfer import to_device


@dataclass(frozen=True)
class Conditioning:
    """Everything that conditions a prediction, R rows of it.

    context: one vector per token, for cross-attention.
    pooled: one vector per prompt, added to the time embedding.
    size: six numbers of pixels per picture (see SIZE_NUMBERS), float32, added to the time embedding too.
    residuals: one tensor per skip of the U-Net, first to last, then one for the middle's output; each is added there. () adds nothing.
    """

    context: Float[Tensor, "R L D"]
    pooled: Float[Tensor, "R P"] | None = None
    size: Float[Tensor, "R S"] | None = None
    residuals: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return self.with_tensors([x[rows] for x in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        return [x for x in (self.context, self.pooled, self.size, *self.residuals) if x is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Conditioning":
        """Return a conditioning of the same fields with these tensors, in the order of `tensors`."""
        context, *rest = tensors
        pooled = rest.pop(0) if self.pooled is not None else None
        size = rest.pop(0) if self.size is not None else None
        return Conditioning(context, pooled, size, tuple(rest))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """Move to a device and a dtype; the size numbers stay float32, since half precision cannot count pixels."""
        return self.with_tensors([x.to(device) if x is self.size else x.to(device, dtype) for x in self.tensors()])

    def expand(self, rows: int) -> "Conditioning":
        """Repeat a single row `rows` times, without copying it."""
        return self.with_tensors([x.expand(rows, *x.shape[1:]) for x in self.tensors()])


def as_conditioning(context: Float[Tensor, "R L D"] | Conditioning) -> Conditioning:
    """Return a conditioning as it is, and a plain tensor as the context of one."""
    return context if isinstance(context, Conditioning) else Conditioning(context)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Put the rows of the second behind those of the first. Raises ValueError where the two differ in shapes or in what they hold."""
    shapes = [[(f.name, _shape(getattr(one, f.name))) for f in fields(one)] for one in (first, second)]
    if differing := [(name, a, b) for (name, a), (_, b) in zip(*shapes) if a != b]:
        name, a, b = differing[0]
        raise ValueError(f"two conditionings do not match: {name} has shape {a} and {b}; give one negative (or empty) prompt per prompt")
    return first.with_tensors([torch.cat(pair) for pair in zip(first.tensors(), second.tensors())])


def _shape(value: Tensor | tuple[Tensor, ...] | None) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value and [tuple(x.shape) for x in value]


@dataclass(eq=False)
class TextSide:
    """Tokenizer and text encoder together: prompts in, Conditioning out. Models with two of each have two_encoders.py.

    encoders, tokenizers: by the names of the modules in `StableDiffusion.parts`.
    """

    tokenizers: dict[str, Tokenizer]
    encoders: dict[str, TextEncoder]

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each. size: (width, height) in pixels, for models that are told it; Stable Diffusion 1 and 2 are not."""
        return Conditioning(self.encoders["text_encoder"](self.tokens("text_encoder", prompts)))

    def tokens(self, name: str, prompts: Sequence[str]) -> Int[Tensor, "R L"]:
        """Return the tokens of prompts for one of the encoders, on its device."""
        return to_device(self.encoders[name].token_embedding.weight.device, self.tokenizers[name](list(prompts)))

    def guided(
        self, prompts: Sequence[str], negative: str | None, size: tuple[int, int] | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts, and for each what its picture is guided away from; None means that nothing was given: the empty prompt."""
        rows = self([*prompts, negative or ""], size)
        return rows[:-1], rows[-1:].expand(len(prompts))
