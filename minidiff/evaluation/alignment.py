"""Measure how well pictures follow their prompts and resemble their examples: cosines of CLIP features.

Text alignment is CLIPScore (Hessel et al. 2021) without its factor, image alignment is CLIP-I of DreamBooth (Ruiz et al. 2023) and
Custom Diffusion (Kumari et al. 2023). Both depend on the encoder, so numbers from different encoders cannot be compared.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pixels = Float[Tensor, "B 3 H W"]  # in [-1, 1]
Features = Float[Tensor, "B D"]


@runtime_checkable
class Encoder(Protocol):
    """A model that encodes pictures of its size and texts to features of the same width: the judge, or another CLIP."""

    image_size: int

    def encode_pictures(self, pixels: Pixels) -> Features:
        """Encode pictures of `image_size`."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Features:
        """Encode texts of any length."""
        ...


def check_size(pixels: Float[Tensor, "B 3 H W"], size: int, reader: str) -> None:
    """Raise ValueError for pictures that are not `size` pixels wide and high."""
    if pixels.shape[2:] != (size, size):
        raise ValueError(
            f"pictures of {pixels.shape[3]} x {pixels.shape[2]} pixels given, the {reader} reads {size} x {size}; scale them first"
        )


def text_alignment(pictures: Float[Tensor, "B D"], texts: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Return the cosine of each picture's features with those of its own text, -1..1."""
    return F.cosine_similarity(pictures, texts, dim=1)


def image_alignment(pictures: Float[Tensor, "B D"], references: Float[Tensor, "R D"]) -> Float[Tensor, " B"]:
    """Return the mean cosine of each picture's features with those of all reference pictures, -1..1."""
    return (F.normalize(pictures, dim=1) @ F.normalize(references, dim=1).T).mean(dim=1)


def drift(pictures: Float[Tensor, "B D"], before: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Return 1 - the cosine of each picture's features with those of its counterpart before training: 0 is unchanged, up to 2.

    before: features of pictures from the same prompts and noise.
    """
    return 1 - F.cosine_similarity(pictures, before, dim=1)
