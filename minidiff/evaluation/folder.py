"""A folder of pictures that were drawn: which they are, and from which prompts.

Captions stand in the folder as for training (trainers/data.py). Without any, the PNGs of `minidiff generate` and of the web interfaces
say their prompts themselves. A grid of several pictures says the size of one of them, and is passed over.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from minidiff.trainers.data import UNREADABLE, caption_sources, picture_paths, read_captions

SETTINGS = re.compile(r"(?P<prompt>.*?)\n(?:Negative prompt: .*?\n)?Steps: [^\n]*\bSize: (?P<width>\d+)x(?P<height>\d+)", re.DOTALL)


def drawn_pictures(folder: Path) -> list[Path]:
    """The pictures, without grids, of which a warning tells. Raises ValueError for a folder without pictures, and as `picture_paths` does."""
    pictures, grids = [], []
    for path in picture_paths(folder):
        settings = settings_inside(path)
        (grids if settings and settings[1] != picture_size(path) else pictures).append(path)
    if grids:
        warnings.warn(f"{folder}: grids of several pictures are left out: {', '.join(path.name for path in grids)}", stacklevel=2)
    if not pictures:
        raise ValueError(f"{folder}: no picture in it; give a folder with .png or .jpg files")
    return pictures


def prompts_of(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """The caption of each picture; none at all if the folder has no captions and a picture does not say its prompt.

    Raises ValueError for captions that miss a picture.
    """
    if caption_sources(folder):
        captions = read_captions(folder, pictures)
        return [captions[path.name] for path in pictures]
    inside = [settings_inside(path) for path in pictures]
    return [settings[0] for settings in inside if settings] if all(inside) else []


def settings_inside(path: Path) -> tuple[str, tuple[int, int]] | None:
    """The prompt, and width and height, as they stand in a PNG's text chunk "parameters"; None without one."""
    try:
        with Image.open(path) as image:
            found = SETTINGS.match(image.info.get("parameters", ""))
    except UNREADABLE:
        return None  # who reads its pixels says what is wrong with it
    return (found["prompt"], (int(found["width"]), int(found["height"]))) if found else None


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
