"""A folder of generated pictures: find them, and the prompts that made them.

Captions are written as for training (captions.py). Without captions, the prompts are read from the PNGs of `minidiff generate` and of the
web interfaces, which hold their settings. A grid of several pictures states the size of a single one; it is skipped.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from minidiff.captions import check_caption, find_caption_sources, read_captions
from minidiff.pictures import list_pictures
from minidiff.png_settings import is_grid, read_settings


def find_drawn_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder; grids are left out with a warning. Raises ValueError for no pictures, and like `list_pictures`."""
    paths = list_pictures(folder)
    if grids := [path for path in paths if is_grid(path)]:
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
