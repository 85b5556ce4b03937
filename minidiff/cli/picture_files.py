"""Which pictures are asked for, and the files they are written to.

prompts, --prompts-file -> one row per prompt --.
                                                 >- pairs of prompt and seed -> files: the sheet, and each picture alongside
--seed and --batch, or --seeds -> columns ------'
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli.names import check_writable, free_path, slug

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL import Image

LARGEST_ZOOM = 64
MOST_SEEDS = 4096  # of a prompt; more are a slip of the keyboard


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Read a prompt per line of a text file; blank lines and those that begin with # are left out. Raises ValueError for no prompts."""
    from minidiff.files import read_text

    if path is None:
        return ()
    if not path.is_file():
        raise FileNotFoundError(f"--prompts-file {path}: no such file; write one prompt per line into it")
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not (prompts := tuple(line for line in lines if line and not line.startswith("#"))):
        raise ValueError(f"--prompts-file {path}: no prompts in it; write one per line")
    return prompts


def choose_seeds(seed: int, batch: int, seeds: str | None) -> list[int]:
    """Return the seeds of each prompt: those of "0-8" or "3,7,9", or else `batch` of them from `seed` on. Raises ValueError for others."""
    if batch > MOST_SEEDS:
        raise ValueError(f"--batch {batch}: at most {MOST_SEEDS} pictures of a prompt")
    if seeds is None:
        return [seed + i for i in range(batch)]
    if seed or batch != 1:
        raise ValueError(f"--seeds {seeds} with {'--seed' if seed else '--batch'}: give one of the two")
    found: list[int] = []
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--seeds {seeds}: {part.strip()!r} is no seed; write 0-8, or 3,7,9")
        start, end = int(first), int(last or first)
        if not start <= end < start + MOST_SEEDS:
            raise ValueError(f"--seeds {seeds}: {part.strip()} is {'empty' if end < start else 'too many'}; at most {MOST_SEEDS}, as 0-8")
        found += range(start, end + 1)
        if len(found) > MOST_SEEDS:
            raise ValueError(f"--seeds {seeds}: too many; at most {MOST_SEEDS}")
    return found


def is_folder(out: Path | None) -> bool:
    """Say whether --out is a folder for the pictures: one that is there, or a name without an ending."""
    return out is not None and (os.path.isdir(out) or not out.suffix)  # not Path.is_dir, which raises for a name that is too long


def picture_files(out: Path | None, prompts: "Sequence[str]", pairs: "Sequence[tuple[str, int]]") -> list[Path]:
    """Return the names of all files: of the picture, or of the sheet and each picture in it. Only `out` may be a file that is there.

    Args:
        out: the first one; a free name made of the first prompt and its seed by default, in `out` where that is a folder
        prompts: those that were given
        pairs: prompt and seed of each picture
    """
    folder = out if out is not None and is_folder(out) else Path()
    first = free_path(folder / f"{slug(prompts[0])}-{pairs[0][1]}.png") if out is None or is_folder(out) else out
    if len(pairs) == 1:
        return [first]
    alone = len(prompts) == 1
    names = [
        f"{first.stem}-{seed}.png" if alone else f"{first.stem}-{i}-{slug(prompt)}-{seed}.png" for i, (prompt, seed) in enumerate(pairs)
    ]
    return [first, *_free_paths(first.parent, names)]


def _free_paths(folder: Path, names: "Sequence[str]") -> "Iterator[Path]":
    taken: set[Path] = set()
    for name in names:
        path = free_path(folder / name)
        while path in taken:  # a seed or a prompt that was given twice
            path = free_path(path.with_name(f"{path.stem}-again.png"))
        taken.add(path)
        yield path


def check_files(out: Path | None, files: "Sequence[Path]") -> None:
    """Raise ValueError or OSError for files that cannot be written; of a folder that is yet to be made, its place is looked at."""
    from minidiff.pictures import check_png

    if out is not None and is_folder(out) and not out.is_dir():
        check_writable(out)
        return
    for file in files:
        check_png(file)
        check_writable(file)


def check_zoom(zoom: int) -> None:
    """Raise ValueError for a zoom that is out of range."""
    if not 1 <= zoom <= LARGEST_ZOOM:
        raise ValueError(f"--zoom {zoom} is outside 1..{LARGEST_ZOOM}; 4 makes a picture four times as wide")


def enlarge(image: "Image.Image", zoom: int, how: str) -> "Image.Image":
    """Enlarge a picture for viewing. how: nearest, where every pixel becomes a square, or lanczos."""
    from PIL import Image

    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling[how.upper()]) if zoom > 1 else image


def write_pictures(
    files: "Sequence[Path]",
    images: "Sequence[Image.Image]",
    prompts: "Sequence[str]",
    pairs: "Sequence[tuple[str, int]]",
    negative_prompt: str,
    values: "Mapping[str, object]",
    seeds: str | None,
) -> None:
    """Write the picture, or the sheet of several and each of them alongside; a sheet of several prompts has a row for each.

    Args:
        files: as `picture_files` names them; their folder is made if need be
        images: the pictures
        prompts: those that were given
        pairs: prompt and seed of each picture
        negative_prompt: of all
        values: settings of all, under the names that web interfaces use
        seeds: what --seeds was given
    """
    from minidiff.pictures import grid, save_png
    from minidiff.png_settings import picture_settings

    files[0].parent.mkdir(exist_ok=True)
    columns = len(pairs) // len(prompts)
    several: dict[str, object] = {"Batch size": columns} if columns > 1 else {}
    if seeds is not None and columns > 1:
        several = {"Seed": None, "Seeds": seeds}
    sheet = grid(images, columns if columns > 1 and len(prompts) > 1 else None)
    save_png(sheet, files[0], picture_settings(prompts, negative_prompt, {**values, **several}))
    for (prompt, seed), image, file in zip(pairs, images, files[1:]):
        save_png(image, file, picture_settings([prompt], negative_prompt, {**values, "Seed": seed}))
