"""A folder of pictures that were drawn: which they are, and from which prompts.

Captions stand in the folder as for training (trainers/data/folder.py). Without any, the PNGs of `minidiff generate` and of the web interfaces
say their prompts themselves. A grid of several pictures says the size of one of them, and is passed over.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from minidiff.captions import caption_sources, read_captions
from minidiff.pictures import UNREADABLE, picture_paths
from minidiff.trainers.data.folder import check_caption

SETTINGS = re.compile(r"(?P<prompt>.*?)\n(?:Negative prompt: .*?\n)?Steps: [^\n]*\bSize: (?P<width>\d+)x(?P<height>\d+)", re.DOTALL)


def drawn_pictures(folder: Path) -> list[Path]:
    """The pictures, without grids, of which a warning tells. Raises ValueError for a folder without pictures, and as `picture_paths` does."""
    paths = picture_paths(folder)
    grids = [path for path in paths if is_grid(path)]
    if grids:
        warnings.warn(f"{folder}: grids of several pictures are left out: {', '.join(path.name for path in grids)}", stacklevel=2)
    pictures = [path for path in paths if path not in grids]
    if not pictures:
        raise ValueError(f"{folder}: no picture in it; give a folder with .png or .jpg files")
    return pictures


def prompts_of(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """The caption of each picture; none at all, and a warning, if the folder has no captions and only some pictures say their prompt.

    Raises ValueError for captions that miss a picture or are empty.
    """
    if caption_sources(folder):
        captions = read_captions(folder, pictures)
        for path in pictures:
            check_caption(path, captions[path.name])
        return [captions[path.name] for path in pictures]
    prompts = [settings[0] for path in pictures if (settings := settings_inside(path)) and settings[0].strip()]
    if 0 < len(prompts) < len(pictures):
        warnings.warn(
            f"{folder}: {len(pictures) - len(prompts)} of {len(pictures)} pictures do not say their prompt, so none is read", stacklevel=2
        )
    return prompts if len(prompts) == len(pictures) else []


def settings_inside(path: Path) -> tuple[str, tuple[int, int]] | None:
    """The prompt, and width and height, as they stand in a PNG's text chunk "parameters"; None without one."""
    return parsed(inside(path)[0])


def is_grid(path: Path) -> bool:
    """Whether it is a whole number of times as wide or as high as its settings say, and nothing says that it was enlarged."""
    text, size = inside(path)
    settings = parsed(text)
    if settings is None or size == settings[1] or "upscale" in text.lower():
        return False
    return not any(side % one for side, one in zip(size, settings[1]))


def inside(path: Path) -> tuple[str, tuple[int, int]]:
    """The text chunk "parameters" of a picture, and its width and height."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters", ""), image.size
    except UNREADABLE:
        return "", (0, 0)  # who reads its pixels says what is wrong with it


def parsed(text: str) -> tuple[str, tuple[int, int]] | None:
    found = SETTINGS.match(text)
    return (found["prompt"], (int(found["width"]), int(found["height"]))) if found else None
