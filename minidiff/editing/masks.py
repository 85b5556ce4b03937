"""Masks: which part of a picture is repainted, in pixels and in latent cells, and how the new part is laid over the old picture.

    mask (1 = repaint) -- cells of the latent that it touches ----> what the denoising loop may change
                       -- feather: falls to 0 around it ----------> paste: original + alpha (new - original)

The VAE is lossy: decoding even an untouched latent changes every pixel. So the original is pasted back, and beyond the feather its pixels
are kept to the bit. A mask touches whole latent cells; pixels that were repainted only because their cell is larger lie under the feather,
or are dropped.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.pictures import open_picture, to_rgb

Mask = Float[Tensor, "1 1 H W"]  # of zeros and ones
HALF = 128  # of 255: grey from here on counts as white, and as opaque


def load_mask(path: Path) -> Mask:
    """Read a mask: what is transparent in the picture, or if nothing is, what is white. Raises like `open_picture`."""
    values = np.asarray(open_picture(path, to_grey))
    return torch.from_numpy((values >= HALF).astype(np.float32))[None, None]


def to_grey(image: Image.Image) -> Image.Image:
    """Convert a picture that is a mask to 8 bits of grey, white where it is transparent; without transparency, as bright as it is."""
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if np.asarray(alpha).min() < HALF:
            return ImageOps.invert(alpha)
    return to_rgb(image).convert("L")


def check_mask(mask: Mask) -> None:
    """Raise ValueError for a mask that repaints nothing or everything."""
    if not mask.any():
        raise ValueError("the mask is all black, so nothing would be repainted; paint the part to repaint white")
    if mask.all():
        raise ValueError("the mask is all white, so nothing of the picture would be kept; leave the mask out")


def mask_box(mask: Mask) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the smallest box around the mask, right and bottom excluded."""
    ys, xs = mask[0, 0].nonzero(as_tuple=True)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def to_cells(mask: Mask, factor: int) -> Float[Tensor, "1 1 h w"]:
    """Return the mask of the latent cells, factor x factor pixels each, that have any pixel of it."""
    return F.max_pool2d(mask, factor)


def cover_cells(mask: Mask, factor: int) -> Mask:
    """Grow a mask to whole latent cells."""
    return F.interpolate(to_cells(mask, factor), scale_factor=factor, mode="nearest")


def grow_small_mask(mask: Mask, factor: int) -> tuple[Mask, str | None]:
    """Grow a mask narrower or lower than a latent cell to whole cells, and say so; leave others as they are."""
    left, top, right, bottom = mask_box(mask)
    if right - left >= factor and bottom - top >= factor:
        return mask, None
    grown = cover_cells(mask, factor)
    old, (left, top, right, bottom) = (right - left, bottom - top), mask_box(grown)
    return grown, f"the mask is {old[0]} x {old[1]} pixels, less than a latent cell; grown to {right - left} x {bottom - top}"


def feather(mask: Mask, width: int) -> Mask:
    """Return alpha: 1 on the mask, falling evenly to 0 at width + 1 pixels from it (in x or y, whichever is farther).

    Raises ValueError for a width below 0.
    """
    if width < 0:
        raise ValueError(f"feather {width}: give 0 pixels or more")
    grown = [F.max_pool2d(mask, 2 * d + 1, stride=1, padding=d) for d in range(width + 1)]
    return torch.stack(grown).mean(dim=0)


def paste(original: Float[Tensor, "1 3 H W"], made: Float[Tensor, "B 3 H W"], alpha: Mask) -> Float[Tensor, "B 3 H W"]:
    """Lay new pixels over the original by alpha; where that is 0, the original stays as it is, bit for bit."""
    return original + alpha * (made - original)
