"""The canvas of an edit: a picture brought to a size that a model works at, made larger for outpainting, or only a part of it.

    fit            crop (to the shape, around the middle), resize (distorted), or pad (edges stretched outward)
    pad_to_cells   whole latent cells, by a few columns and rows at the right and bottom, cut off again afterwards
    outpaint       a border to be painted: edges stretched outward, and the mask of it
    crop_around    the part around a mask, which is worked on at the model's size and put back
    make_canvas    all of it for inpainting: pixels and mask to work on, and the way back to the original

Pixels and masks are both tensors here; a mask that was resized is cut at one half again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minidiff.config import check_choice
from minidiff.editing.masks import Mask, check_mask, feather, mask_box, paste
from minidiff.pictures import MOST_PIXELS

FITS = ("crop", "resize", "pad")
SIDES = ("left", "right", "top", "bottom")  # in the order of F.pad
# On each side of a mask, what the model sees of the surroundings: this share of the mask's longer side, and at least this part of the size
# that is worked at (32 of 512 pixels).
MARGIN, LEAST = 0.25, 16


# --- sizes ------------------------------------------------------------------------------------------------------------


def usual_size(width: int, height: int, model_size: int, factor: int) -> tuple[int, int]:
    """Return (width, height) to scale: the shorter side is the model's own size, both are multiples of factor.

    Args:
        width, height: of the picture, in pixels.
        model_size: the model's own, in pixels.
        factor: of the VAE.
    """
    scale = model_size / min(width, height) / factor
    return round(width * scale) * factor, round(height * scale) * factor


def _check_size(width: int, height: int) -> None:
    """Raise ValueError for a size without pixels."""
    if min(width, height) < 1:
        raise ValueError(f"size {width} x {height} has no pixels; give at least 1 a side, in multiples of the VAE's")


def resize(pixels: Float[Tensor, "B C H W"], width: int, height: int) -> Float[Tensor, "B C h w"]:
    """Resize: bicubic, antialiased where it shrinks, within the range of the pixels."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(pixels.min(), pixels.max())


def fit(pixels: Float[Tensor, "B C H W"], width: int, height: int, how: str) -> Float[Tensor, "B C h w"]:
    """Bring pixels to a size, by one of FITS: "crop" loses edges, "resize" distorts, "pad" stretches the edges outward.

    Args:
        pixels: of pictures, or a mask.
        width, height: in pixels.
        how: one of FITS.

    Raises ValueError for another, and for a size without pixels.
    """
    check_choice("fit", how, FITS)
    _check_size(width, height)
    H, W = pixels.shape[2:]
    if how == "crop":
        scale = min(W / width, H / height)
        w, h = round(width * scale), round(height * scale)
        left, top = (W - w) // 2, (H - h) // 2
        pixels = pixels[:, :, top : top + h, left : left + w]
    elif how == "pad":
        scale = min(width / W, height / H)
        w, h = max(1, round(W * scale)), max(1, round(H * scale))
        left, top = (width - w) // 2, (height - h) // 2
        return F.pad(resize(pixels, w, h), (left, width - w - left, top, height - h - top), mode="replicate")
    return resize(pixels, width, height)


def pad_to_cells(pixels: Float[Tensor, "B C H W"], factor: int) -> Float[Tensor, "B C h w"]:
    """Repeat the last column and row until both sides are multiples of factor."""
    H, W = pixels.shape[2:]
    return F.pad(pixels, (0, -W % factor, 0, -H % factor), mode="replicate")


# --- outpainting ------------------------------------------------------------------------------------------------------


def read_sides(text: str) -> dict[str, int]:
    """Read "left=64,top=32", in pixels. Raises ValueError for another side or another number, and for none at all."""
    sides = {}
    for part in text.split(","):
        side, _, pixels = (word.strip() for word in part.partition("="))
        if side not in SIDES or not pixels.isdecimal() or side in sides:
            raise ValueError(f"outpaint {text!r}: {part.strip()!r} is no side with its pixels; write left=64,right=64,top=32,bottom=32")
        sides[side] = int(pixels)
    if not any(sides.values()):
        raise ValueError(f"outpaint {text!r} adds no pixel; write left=64, say")
    return sides


def outpaint(
    pixels: Float[Tensor, "B C H W"], sides: Mapping[str, int], mask: Mask | None = None
) -> tuple[Float[Tensor, "B C H_out W_out"], Float[Tensor, "1 1 H_out W_out"]]:
    """Return the pixels with a border, their edges stretched outward, and its mask, together with one that was there.

    Raises ValueError for more pixels in all than a picture may have.
    """
    H, W = pixels.shape[2:]
    width, height = W + sides.get("left", 0) + sides.get("right", 0), H + sides.get("top", 0) + sides.get("bottom", 0)
    if width * height > MOST_PIXELS:
        raise ValueError(f"outpaint makes {width} x {height} pixels of {W} x {H}; at most {MOST_PIXELS // 10**6} megapixels are made")
    border = tuple(sides.get(side, 0) for side in SIDES)
    inside = torch.zeros(1, 1, *pixels.shape[2:]) if mask is None else mask
    return F.pad(pixels, border, mode="replicate"), F.pad(inside, border, value=1.0)


# --- only the masked part ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """A box in a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Return the pixels in the box."""
        return pixels[:, :, self.top : self.top + self.height, self.left : self.left + self.width]

    def put_back(self, part: Float[Tensor, "B C h w"], pixels: Float[Tensor, "1 C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the pixels with the box replaced by `part`, resized to it."""
        made = pixels.expand(len(part), *pixels.shape[1:]).clone()
        self.cut(made)[:] = resize(part, self.width, self.height)
        return made


def crop_around(mask: Mask, width: int, height: int) -> Crop:
    """Return the box around a mask with a margin, widened to the shape width : height as far as the picture reaches."""
    left, top, right, bottom = mask_box(mask)
    margin = max(round(MARGIN * max(right - left, bottom - top)), max(width, height) // LEAST)
    w, h = right - left + 2 * margin, bottom - top + 2 * margin
    w, h = max(w, round(h * width / height)), max(h, round(w * height / width))
    H, W = mask.shape[2:]
    w, h = min(w, W), min(h, H)
    x, y = (left + right - w) // 2, (top + bottom - h) // 2
    return Crop(min(max(x, 0), W - w), min(max(y, 0), H - h), w, h)


# --- what inpainting works on -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canvas:
    """The pixels and the mask that inpainting is given, and how its result is laid over the original.

    original, alpha: at the picture's own size; alpha is the feathered mask. crop: the part that is worked on.
    pixels, mask: of that part, resized to inner = (height, width) and then padded to whole cells.
    """

    original: Float[Tensor, "1 3 H W"]
    alpha: Mask
    crop: Crop
    inner: tuple[int, int]
    pixels: Float[Tensor, "1 3 h w"]
    mask: Float[Tensor, "1 1 h w"]

    def follow(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Bring pixels of the original's size to what is worked on, as `pixels` and `mask` were."""
        part, (h, w) = resize(self.crop.cut(pixels), self.inner[1], self.inner[0]), self.pixels.shape[2:]
        return F.pad(part, (0, w - part.shape[3], 0, h - part.shape[2]), mode="replicate")

    def finish(self, made: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
        """Return the originals with what was made laid over; beyond the feather, bit for bit the original."""
        part = made[:, :, : self.inner[0], : self.inner[1]]
        return paste(self.original, self.crop.put_back(part, self.original), self.alpha)


def make_canvas(
    original: Float[Tensor, "1 3 H W"], mask: Mask, factor: int, size: tuple[int, int] | None = None, feather_width: int | None = None
) -> Canvas:
    """Return the canvas of a whole picture, or of the part around the mask.

    Args:
        original: pixels in [-1, 1].
        mask: 1 where they are repainted.
        factor: of the VAE, pixels a latent cell.
        size: (width, height) in pixels to work on the part around the mask at; None works on the whole picture at its own size.
        feather_width: in the picture's pixels, 0 or more; None is a latent cell.

    Raises ValueError for a mask of one value, a size without pixels, and a feather below 0.
    """
    check_mask(mask)
    H, W = original.shape[2:]
    width, height = size or (W, H)
    _check_size(width, height)
    crop = crop_around(mask, width, height) if size else Crop(0, 0, W, H)
    if feather_width is None:
        feather_width = max(1, round(factor * crop.width / width))
    pixels = pad_to_cells(resize(crop.cut(original), width, height), factor)
    part = (resize(crop.cut(mask), width, height) >= 0.5).float()
    part = F.pad(part, (0, -width % factor, 0, -height % factor))
    return Canvas(original, feather(mask, feather_width), crop, (height, width), pixels, part)
