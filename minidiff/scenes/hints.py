"""Hints for a ControlNet that scenes know exactly, where photographs need a learned model: outline, class segmentation, depth order.

Scene(image, objects) -> hint, 8-bit RGB of the scene's size
"""

import colorsys
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, UInt8

from minidiff.scenes.art import subjects
from minidiff.scenes.scenes import Scene

Hint = UInt8[np.ndarray, "H W 3"]


def outline(scene: Scene) -> Hint:
    """Draw the rim of each object, one pixel wide, white on black. Which object it is must come from the prompt."""
    rims = np.logical_or.reduce([rim(one.mask > 0.5) for one in scene.objects])
    return np.repeat(rims[..., None], 3, axis=2).astype(np.uint8) * 255


def rim(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the pixels of a mask that touch its outside, left, right, above or below."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def segmentation(scene: Scene) -> Hint:
    """Paint each object in the colour of its class, on black."""
    canvas = np.zeros_like(scene.image)
    for one in scene.objects:
        canvas[one.mask > 0.5] = class_colours()[one.class_name]
    return canvas


def depth(scene: Scene) -> Hint:
    """Paint the objects by their order from back to front, the front one white, the background black."""
    canvas = np.zeros_like(scene.image)
    for k, one in enumerate(scene.objects, start=1):
        canvas[one.mask > 0.5] = round(255 * k / len(scene.objects))
    return canvas


@functools.cache
def class_colours() -> dict[str, tuple[int, int, int]]:
    """Return one colour per class, bright and of equally spaced hues, in alphabetical order of the classes."""
    names = sorted({subject.class_name for subject in subjects().values()})
    wheel = {name: colorsys.hsv_to_rgb(i / len(names), 1.0, (1.0, 0.6)[i % 2]) for i, name in enumerate(names)}
    return {name: (round(255 * r), round(255 * g), round(255 * b)) for name, (r, g, b) in wheel.items()}


SCENE_HINTS: dict[str, Callable[[Scene], Hint]] = {"outline": outline, "segmentation": segmentation, "depth": depth}
