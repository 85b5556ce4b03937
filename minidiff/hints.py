"""Hints that need no learned model: what a ControlNet is shown, made from a picture.

    canny      thin edges             a photograph whose outlines are kept
    scribble   thick, rough lines     the same, as if drawn by hand
    tile       colours without detail an enlargement that invents the detail
    inpaint    the picture, and holes what the ControlNet is to fill

Lines are white on black. Hints are 8-bit RGB here and in files, [0, 1] for the ControlNet (`to_hint`); the hole of an inpainting hint is
transparent in the file and -1 for the ControlNet.

Papers: Canny 1986, "A computational approach to edge detection", in the form of OpenCV's function, which the published ControlNets were
trained with; Zhang et al. 2023, section 4 and, for tile and inpaint, the ControlNet 1.1 release. Left out: hints that other networks make
(depth, normals, pose, segmentation, HED).
"""

from collections.abc import Callable
from math import ceil

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from minidiff.pictures import to_rgb

TAN_22_5 = 13573  # tan(22.5 degrees) * 2^15, rounded, as OpenCV has it
KIND_KEY = "hint"  # of the text chunk in a PNG that says which kind of hint it is
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
NEAR = 32  # of 255: so far from black or white still counts as black or white
THICKEST = 8  # lines of a scribble are at most this part of the shorter side: what drawing takes grows by the square of it
TWO_VALUED, MOSTLY = 0.85, 0.6  # shares of the pixels that are black or white, and white, in a picture of lines


# --- edges ------------------------------------------------------------------------------------------------------------


def canny(picture: UInt8[np.ndarray, "H W 3"], low: float = 100, high: float = 200) -> UInt8[np.ndarray, "H W 3"]:
    """Return thin edges, white on black: OpenCV's Canny(picture, low, high), bit for bit.

    Gradients are Sobel's, |dx| + |dy| of the strongest channel. A pixel is on an edge if its gradient is above `low` and largest across the
    edge; edges are kept from end to end where they reach `high` anywhere. Raises ValueError unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"canny thresholds {low:g} and {high:g}: give 0 <= low <= high, such as 100 and 200")
    dx, dy = _sobel(picture.astype(np.int64))
    channel = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    dx, dy = (np.take_along_axis(d, channel, axis=2)[..., 0] for d in (dx, dy))
    size = np.abs(dx) + np.abs(dy)
    thin = (size > int(low)) & _largest_across(size, dx, dy)
    return _white(_connected(thin, thin & (size > int(high))))


def _sobel(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both derivatives per channel, (H, W, C) each; beyond the rim pixels are repeated."""
    H, W = x.shape[:2]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    along = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return across[:H] + 2 * across[1 : H + 1] + across[2:], along[2:] - along[:-2]


def _largest_across(size: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> Bool[np.ndarray, "H W"]:
    """Return where the gradient is at least that of both neighbours in its direction, of four directions; of two equal ones one is kept."""
    H, W = size.shape
    padded = np.pad(size, 1)

    def neighbour(y: int, x: int) -> np.ndarray:
        return padded[1 + y : H + 1 + y, 1 + x : W + 1 + x]

    x, y = np.abs(dx), np.abs(dy) << 15
    level, steep = y < x * TAN_22_5, y > x * TAN_22_5 + (x << 16)  # tan(67.5) is tan(22.5) + 2
    left_right = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    up_down = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(level, left_right, np.where(steep, up_down, diagonal))


def _connected(among: Bool[np.ndarray, "H W"], seeds: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the pixels of `among` that a path of such pixels joins to a seed, also diagonally."""
    kept, rim = seeds.copy(), seeds
    while rim.any():
        rim = _dilate(rim, NEIGHBOURS) & among & ~kept
        kept |= rim
    return kept


def _dilate(mask: Bool[np.ndarray, "H W"], offsets: list[tuple[int, int]]) -> Bool[np.ndarray, "H W"]:
    """Return where the mask, moved by one of the offsets, is set."""
    H, W = mask.shape
    reach = max(max(abs(y), abs(x)) for y, x in offsets)
    padded, result = np.pad(mask, reach), np.zeros_like(mask)
    for y, x in offsets:
        result |= padded[reach - y : reach - y + H, reach - x : reach - x + W]
    return result


def disk(radius: float) -> list[tuple[int, int]]:
    """Return the offsets of the pixels within a radius, the centre among them."""
    reach = ceil(radius)
    return [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1) if y * y + x * x <= radius * radius]


def _white(mask: Bool[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    return np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255


def edge_f1(
    found: Bool[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"],
    expected: Bool[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"],
    within: float = 2,
) -> float:
    """Return how well two edge pictures agree, 0..1: the harmonic mean of the shares of each that lie within some pixels of the other."""
    found, expected = (edges if edges.ndim == 2 else edges.max(axis=2) > 127 for edges in (found, expected))
    if not found.any() or not expected.any():
        return float(found.any() == expected.any())
    precision = (found & _dilate(expected, disk(within))).sum() / found.sum()
    recall = (expected & _dilate(found, disk(within))).sum() / expected.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


# --- other hints ------------------------------------------------------------------------------------------------------


def scribble(
    picture: UInt8[np.ndarray, "H W 3"], low: float = 50, high: float = 100, width: int | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the edges of the blurred picture as thick lines: what is left are the large shapes, as a hand would draw them.

    Args:
        picture: RGB.
        low, high: thresholds, as of canny; the blur leaves smaller gradients.
        width: of the lines, in pixels; by default 1/85 of the shorter side, 6 at 512, where the published ControlNet knows 1 to 24.

    Raises ValueError for a width below 1 or above 1/8 of the shorter side.
    """
    shorter = min(picture.shape[:2])
    width = max(1, round(shorter / 85)) if width is None else width
    most = max(1, shorter // THICKEST)
    if not 1 <= width <= most:
        raise ValueError(f"scribble width {width} is outside 1..{most} for a picture whose shorter side has {shorter} pixels")
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(shorter / 170)))
    edges = canny(blurred, low, high)[..., 0] > 0
    return _white(_dilate(edges, disk(width / 2)))


def tile(picture: UInt8[np.ndarray, "H W 3"], factor: int = 8) -> UInt8[np.ndarray, "H W 3"]:
    """Return the picture without its details: shrunk by a factor, each pixel a mean, and enlarged again.

    Raises ValueError for a factor below 1 or above the shorter side.
    """
    H, W = picture.shape[:2]
    if not 1 <= factor <= min(H, W):
        raise ValueError(f"tile factor {factor} is outside 1..{min(H, W)} for a picture of {W} x {H}")
    small = Image.fromarray(picture).resize((max(1, W // factor), max(1, H // factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((W, H), Image.Resampling.BICUBIC))


def inpaint(picture: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 4"]:
    """Return the picture, transparent in the hole. mask: white (above 127) where the picture is to be filled; of the picture's size.

    Raises ValueError for another size, and for a mask without a hole.
    """
    if mask.shape != picture.shape[:2]:
        (h, w), (H, W) = mask.shape, picture.shape[:2]
        raise ValueError(f"a mask of {w} x {h} pixels for a picture of {W} x {H}; give one of the picture's size")
    if not (mask > 127).any():
        raise ValueError("the mask has no hole: it is black all over; paint white what is to be filled")
    return np.dstack([picture, np.where(mask > 127, 0, 255).astype(np.uint8)])


# --- to the ControlNet ------------------------------------------------------------------------------------------------


def to_hint(image: Image.Image, size: tuple[int, int] | None = None) -> Float[Tensor, "3 H W"]:
    """Convert a hint to [0, 1], resized to (width, height) as diffusers does, by Lanczos.

    What is transparent lies on white, as in the authors' code; in an inpainting hint of `minidiff hint inpaint` it is the hole, -1.
    """
    hole = None
    if image.info.get(KIND_KEY) == "inpaint" and image.mode == "RGBA":
        hole = image.getchannel("A").resize(size or image.size, Image.Resampling.NEAREST)
        image = image.convert("RGB")  # the colours as they are, not on white
    image = to_rgb(image)
    image = image if size in (None, image.size) else image.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return pixels if hole is None else torch.where(torch.from_numpy(np.array(hole))[None] > 127, pixels, -1.0)


def doubts(image: Image.Image) -> str | None:
    """Return what is probably wrong with a picture given as a hint: black lines on white, where ControlNets know white on black."""
    black, white = _black_and_white(to_rgb(image))
    if black + white >= TWO_VALUED and white >= MOSTLY and black > 0:
        return "black lines on white, it seems; ControlNets for lines want white on black: invert it"
    return None


def looks_like_lines(image: Image.Image) -> bool:
    """Return whether a picture is black and white already, as a hint of lines is."""
    kind = image.info.get(KIND_KEY)
    black, white = _black_and_white(to_rgb(image))
    return kind is not None or (black + white >= TWO_VALUED and min(black, white) > 0 and max(black, white) >= MOSTLY)


def _black_and_white(image: Image.Image) -> tuple[float, float]:
    """Return the shares of pixels that are near black and near white."""
    pixels = np.asarray(image)
    return float((pixels.max(axis=2) <= NEAR).mean()), float((pixels.min(axis=2) >= 255 - NEAR).mean())


HINTS: dict[str, Callable[[UInt8[np.ndarray, "H W 3"]], UInt8[np.ndarray, "H W 3"]]] = {"canny": canny, "scribble": scribble, "tile": tile}
