"""What a trainer learns from: a folder of pictures with captions, and each picture as pixels of the model's size.

    folder -> read_folder -> Example(path, caption) -> load_picture -> fit -> pixels (3, size, size) in [-1, 1]

Captions stand beside the pictures, in one of the three ways that other programs write; everything that can be wrong with a folder
is found before training starts. Left out: colour profiles, all but the first frame of an animation, and training on several
shapes at once: every picture is cut to a square.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minidiff.captions import check_caption, find_caption_sources, read_captions
from minidiff.pictures import ENDINGS, check_picture, list_pictures


@dataclass(frozen=True)
class Example:
    """A picture and the words for it."""

    path: Path
    caption: str


def read_folder(folder: Path, *, size: int, caption: str | Callable[[Path], str] | None = None) -> list[Example]:
    """Every picture of a folder with its caption, in the order of their names; each is opened once, so that none fails later.

    size: pixels of the model, to tell a picture that is too small. caption: one for all, or a function of the path; with None they
    are read from the folder: NAME.txt beside each picture, or metadata.jsonl ({"file_name": ..., "text": ...} a line), or
    captions.json ({file name: caption}). Files are known by what is in them; what is passed over is named in a warning.
    Raises FileNotFoundError or NotADirectoryError for the folder, ValueError for what is in it; each names the file.
    """
    paths = list_pictures(folder)
    if not paths:
        raise ValueError(f"{folder}: no picture in it; expected files that end in {', '.join(ENDINGS)}")
    if caption is None:
        captions = read_captions(folder, paths)
    else:
        if unread := find_caption_sources(folder):
            warnings.warn(
                f"{folder}: its captions ({', '.join(unread)}) are not read, for one is given; --captions reads them", stacklevel=2
            )
        captions = {path.name: caption(path) if callable(caption) else caption for path in paths}
    for path in paths:
        check_caption(path, captions[path.name])
        check_picture(path, size)
    return [Example(path, " ".join(captions[path.name].split())) for path in paths]


def check_distinct(folders: Sequence[Path]) -> None:
    """Raise ValueError if two of the folders are the same one: two concepts, or a concept and its class pictures."""
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder}: given twice; every concept and every set of class pictures needs a folder of its own")
        seen.add(folder.resolve())
