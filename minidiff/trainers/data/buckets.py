"""Buckets: shapes of about one area, so that a picture that is no square is learned from whole.

    1024 x 1024 in steps of 64 -> 512 x 2048, 512 x 1984, ... 832 x 1216, ... 1024 x 1024, ... 2048 x 512
    picture of 3000 x 2000     -> the nearest ratio, 1216 x 832

Podell et al. 2023, "SDXL", section 2.3 and appendix I: as many pixels as the square has, or up to a tenth less; and no side
shorter than half of the square's. For 1024 in steps of 64 that is the list of the appendix.
"""

from functools import cache
from math import log

LEAST = 0.9  # of the square's pixels


@cache
def buckets(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """Return the (width, height) of all shapes, narrow ones first. Raises ValueError for a step that does not divide the size.

    Args:
        size: side of the square whose area they have, in pixels
        step: pixels; sides are multiples of it
    """
    if step < 1 or size % step or size < 2 * step:
        raise ValueError(f"buckets in steps of {step} pixels: give a number that divides the size {size} at least twice, such as 64")
    sides = range(-(-size // 2 // step) * step, 2 * size + 1, step)
    fitting = [(w, h) for w in sides for h in sides if LEAST * size * size <= w * h <= size * size]
    return tuple(sorted(fitting, key=lambda shape: (shape[0] / shape[1], shape[0])))


def nearest_bucket(width: int, height: int, size: int, step: int) -> tuple[int, int]:
    """Return the shape whose ratio is nearest to a picture's; of two as near, the one with more pixels.

    Args:
        width, height: of the picture, in pixels
        size, step: as in `buckets`
    """
    ratio = log(width / height)
    return min(buckets(size, step), key=lambda shape: (round(abs(log(shape[0] / shape[1]) - ratio), 9), -shape[0] * shape[1]))
