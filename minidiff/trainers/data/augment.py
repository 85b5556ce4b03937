"""Custom Diffusion's augmentation: the subject at several sizes, and a phrase in the caption that says so.

    picture -> resized to a random side -> smaller: on grey, at a random place; the loss counts inside it only   "very small ..."
                                        -> larger: a random window of it                                       "zoomed in ..."

Paper: Kumari et al. 2023, "Multi-concept customization of text-to-image diffusion", section 4. The phrases are a parameter, because
the bundled model knows others than Stable Diffusion.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from minidiff.config import check_choice
from minidiff.pictures import fit
from minidiff.two_encoders import SizeNumbers

SMALL_BELOW = 0.6  # shares of the model's size between which nothing is said: the public code's; the paper gives none
LARGE_ABOVE = 1.0


@dataclass(frozen=True)
class SizeAugmentation:
    """Which sizes, and which words for them.

    kind: "paper" takes any side from 0.4 to 1.4 of the model's size. "code" is the published program: two times in three from 1/3 to 1,
        else from 1.2 to 1.4, where what falls between 0.6 and 1 fills the picture after all. The paper's is the default: it shows every
        size it draws, and its smallest pictures leave more latent cells to learn from.
    small, large: phrases, one of which is drawn for a picture below 0.6 or above 1; the published program says "a far away" for "far away".
    before: the part of a caption in front of which the phrase goes ("a <cat>" becomes "a small <cat>"); None: in front of all.
    """

    kind: str = "paper"
    small: tuple[str, ...] = ("very small", "far away")
    large: tuple[str, ...] = ("zoomed in", "close up")
    before: str | None = None

    def __post_init__(self):
        check_choice("augmentation", self.kind, ("paper", "code"))
        if not self.small or not self.large:
            raise ValueError("augmentation without phrases: small and large need at least one each")

    def check(self, size: int, factor: int) -> None:
        """Raise ValueError if the smallest picture would leave no latent cell to learn from; factor: pixels a cell is wide."""
        smallest = round(0.4 * size) if self.kind == "paper" else size // 3
        if smallest < 3 * factor:
            raise ValueError(
                f"augmentation: {smallest} of {size} pixels are less than 3 latent cells of {factor}; train at a larger size or without"
            )

    def draw_side(self, size: int, rng: np.random.Generator) -> int:
        """Draw the side in pixels to which the picture is resized."""
        if self.kind == "paper":
            return round(size * rng.uniform(0.4, 1.4))
        side = int(rng.integers(size // 3, size + 1) if rng.integers(3) < 2 else rng.integers(int(1.2 * size), int(1.4 * size)))
        side += side % 2
        return size if SMALL_BELOW * size <= side <= size else side

    def size_phrase(self, side: int, size: int, rng: np.random.Generator) -> str:
        """Draw what the caption says of this side; "" for nothing."""
        if SMALL_BELOW * size <= side <= LARGE_ABOVE * size:
            return ""
        phrases = self.small if side < size else self.large
        return phrases[int(rng.integers(len(phrases)))]

    def with_phrase(self, caption: str, phrase: str) -> str:
        """Return the caption with a phrase in it."""
        if not phrase:
            return caption
        if self.before is None or self.before not in caption:
            return f"{phrase} {caption}"
        return caption.replace(self.before, f"{phrase} {self.before}", 1)


PAPER_SIZES = SizeAugmentation()
CODE_SIZES = SizeAugmentation("code", small=("very small", "a far away"))
SCENE_SIZES = SizeAugmentation(small=("small",), large=("large",))  # the bundled model's; replace `before`: they go inside


@dataclass(frozen=True)
class View:
    """A picture as one training sample shows it.

    mask: 1 in the latent cells whose loss counts, else 0. numbers: what SDXL is told of its size, see `size_numbers`.
    """

    pixels: Float[Tensor, "3 H W"]
    mask: Float[Tensor, "1 h w"]
    size_phrase: str
    numbers: list[int]


def size_numbers(
    original: tuple[int, int],
    size: int | tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    side: int | None = None,
) -> list[int]:
    """Return SDXL's size numbers for the largest part of a shape in a picture: the picture's height and width, what is cut off top and
    left, and the part's height and width (Podell et al. 2023, section 2.2).

    Args:
        original: width and height of the picture
        size: side of the square that the model is shown, or (width, height) of another shape
        crop: where it lies along x and y, 0..1, as in pictures.fit
        flip: whether it is mirrored, which makes what is cut off right what is cut off left
        side: of the scaled square, if the model is shown a part of it; the same as size by default
    """
    shown = (size, size) if isinstance(size, int) else size
    scaled = shown if side is None else (side, side)
    x, y = (1 - crop[0] if flip else crop[0]), crop[1]
    # The side that fits exactly, and so how large the whole picture is when the part has its size.
    k = min((0, 1), key=lambda axis: original[axis] / scaled[axis])
    left, top = (round((length * scaled[k] // original[k] - own) * place) for length, own, place in zip(original, scaled, (x, y)))
    return SizeNumbers(original, (left, top), shown).row(shown)


def sized_view(
    image: Image.Image, size: int, factor: int, augmentation: SizeAugmentation, rng: np.random.Generator, *, flip: bool = False
) -> View:
    """Show the centre square of an RGB picture at a random size, on `size` x `size` pixels.

    Args:
        image: the picture
        size: side of the canvas, in pixels
        factor: pixels a latent cell is wide
        augmentation: which sizes, and the phrases for them
        rng: what the size, the phrase and the place are drawn from
        flip: mirror it
    """
    side = augmentation.draw_side(size, rng)
    phrase = augmentation.size_phrase(side, size, rng)
    top, left = (int(start) for start in rng.integers(abs(size - side) + 1, size=2))
    picture, numbers = fit(image, side, flip=flip), size_numbers(image.size, size, side=side)
    if side >= size:
        numbers[2:4] = numbers[2] + top, numbers[3] + left
        pixels = picture[:, top : top + size, left : left + size].contiguous()
        return View(pixels, torch.ones(1, size // factor, size // factor), phrase, numbers)
    pixels = torch.zeros(3, size, size)  # 0 is the grey halfway between black and white
    pixels[:, top : top + side, left : left + side] = picture
    return View(pixels, valid_cells(top, left, side, size, factor), phrase, numbers)


def valid_cells(top: int, left: int, side: int, size: int, factor: int) -> Float[Tensor, "1 h w"]:
    """Return 1 in the latent cells inside the pasted box, less one cell around where the encoder mixes in the grey, as the authors do.

    Args:
        top, left: the corner of the box, in pixels
        side: of the box, in pixels
        size: side of the canvas, in pixels
        factor: pixels a latent cell is wide
    """
    mask = torch.zeros(1, size // factor, size // factor)
    rows, columns = (slice(start // factor + 1, (start + side) // factor - 1) for start in (top, left))
    mask[:, rows, columns] = 1
    return mask
