"""A folder of generated pictures: find them, and the prompts that made them.

Captions are written as for training (captions.py). Without captions, the prompts are read from the PNGs of `minidiff generate` and of the
web interfaces, which hold their settings. A grid of several pictures states the size of a single one; it is skipped.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from minidiff.captions import check_caption, find_caption_sources, read_captions
from minidiff.pictures import UNREADABLE, list_pictures

SETTINGS = re.compile(r"(?P<prompt>.*?)\n(?:Negative prompt: .*?\n)?Steps: [^\n]*\bSize: (?P<width>\d+)x(?P<height>\d+)", re.DOTALL)


def find_drawn_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder; grids are left out with a warning. Raises ValueError for no pictures, and like `list_pictures`."""
    paths = list_pictures(folder)
    grids = [path for path in paths if is_grid(path)]
    if grids:
        warnings.warn(f"{folder}: grids of several pictures are left out: {', '.join(path.name for path in grids)}", stacklevel=2)
    pictures = [path for path in paths if path not in grids]
    if not pictures:
        raise ValueError(f"{folder}: no picture in it; give a folder with .png or .jpg files")
    return pictures


def read_prompts(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """Return the caption of each picture; an empty list, with a warning, if there are no captions and only some pictures hold their prompt.

    Raises ValueError for missing or empty captions.
    """
    if find_caption_sources(folder):
        captions = read_captions(folder, pictures)
        for path in pictures:
            check_caption(path, captions[path.name])
        return [captions[path.name] for path in pictures]
    prompts = [settings[0] for path in pictures if (settings := read_settings(path)) and settings[0].strip()]
    if 0 < len(prompts) < len(pictures):
        warnings.warn(
            f"{folder}: {len(pictures) - len(prompts)} of {len(pictures)} pictures do not say their prompt, so none is read", stacklevel=2
        )
    return prompts if len(prompts) == len(pictures) else []


def read_settings(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) in a PNG's text chunk "parameters", None without one."""
    return parse_parameters(read_parameters(path)[0])


def is_grid(path: Path) -> bool:
    """Return True for a picture several times as wide or high as its settings state, unless these mention upscaling."""
    text, size = read_parameters(path)
    settings = parse_parameters(text)
    if settings is None or size == settings[1] or "upscale" in text.lower():
        return False
    return not any(side % one for side, one in zip(size, settings[1]))


def read_parameters(path: Path) -> tuple[str, tuple[int, int]]:
    """Return the text chunk "parameters" of a picture, and its (width, height)."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters", ""), image.size
    except UNREADABLE:
        return "", (0, 0)  # whoever reads its pixels says what is wrong with it


def parse_parameters(text: str) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) that the text states, None without them."""
    found = SETTINGS.match(text)
    return (found["prompt"], (int(found["width"]), int(found["height"]))) if found else None
