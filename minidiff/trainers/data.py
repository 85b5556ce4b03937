"""What a trainer learns from: a folder of pictures with captions, and each picture as pixels of the model's size.

    folder -> read_folder -> Example(path, caption) -> load_picture -> fit -> pixels (3, size, size) in [-1, 1]

Captions stand beside the pictures, in one of the three ways that other programs write; everything that can be wrong with a folder
is found before training starts. Left out: colour profiles, all but the first frame of an animation, and training on several
shapes at once: every picture is cut to a square.
"""

import json
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SOURCES = ("NAME.txt", "metadata.jsonl", "captions.json")
OTHER_PICTURES = (".heic", ".heif", ".avif", ".gif", ".tif", ".tiff")  # not read, which should not happen in silence
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises for broken files


@dataclass(frozen=True)
class Example:
    """A picture and the words for it."""

    path: Path
    caption: str


# --- folders ----------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, *, size: int, caption: str | Callable[[Path], str] | None = None) -> list[Example]:
    """Every picture of a folder with its caption, in the order of their names; each is opened once, so that none fails later.

    size: pixels of the model, to tell a picture that is too small. caption: one for all, or a function of the path; with None they
    are read from the folder: NAME.txt beside each picture, or metadata.jsonl ({"file_name": ..., "text": ...} a line), or
    captions.json ({file name: caption}). Hidden files are passed over, sub-folders and pictures of other formats with a warning.
    Raises FileNotFoundError or NotADirectoryError for the folder, ValueError for what is in it; each names the file.
    """
    paths = picture_paths(folder)
    if not paths:
        raise ValueError(f"{folder}: no picture in it; expected files that end in {', '.join(PICTURES)}")
    if caption is None:
        captions = read_captions(folder, paths)
    else:
        captions = {path.name: caption(path) if callable(caption) else caption for path in paths}
    for path in paths:
        check_caption(path, captions[path.name])
        check_picture(path, size)
    return [Example(path, " ".join(captions[path.name].split())) for path in paths]


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder by their endings, sorted by name."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; give one with pictures in it")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder with the pictures")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if inner := [path.name for path in entries if path.is_dir()]:
        warnings.warn(f"{folder}: its sub-folders are not read: {', '.join(inner)}", stacklevel=3)
    if others := [path.name for path in entries if path.suffix.lower() in OTHER_PICTURES]:
        warnings.warn(f"{folder}: of formats that are not read: {', '.join(others)}; save them as .png or .jpg", stacklevel=3)
    return [path for path in entries if path.suffix.lower() in PICTURES and path.is_file()]


def check_picture(path: Path, size: int) -> None:
    """Raises ValueError for a picture that cannot be read, or that would be enlarged more than twice."""
    width, height = load_picture(path).size
    if 2 * min(width, height) < size:
        raise ValueError(
            f"{path}: {width} x {height} pixels are too few to learn {size} x {size} from; give at least {-(-size // 2)} a side"
        )


def check_caption(path: Path, caption: str) -> None:
    """Raises ValueError for a caption that says nothing."""
    if not caption.strip():
        raise ValueError(f"{path}: its caption is empty; write what the picture shows")


def check_distinct(folders: Sequence[Path]) -> None:
    """Raises ValueError if two of the folders are the same one: two concepts, or a concept and its class pictures."""
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder}: given twice; every concept and every set of class pictures needs a folder of its own")
        seen.add(folder.resolve())


# --- captions ---------------------------------------------------------------------------------------------------------


def caption_texts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def caption_sources(folder: Path) -> list[str]:
    """Which of CAPTION_SOURCES the folder has."""
    return [name for name in CAPTION_SOURCES if (caption_texts(folder) if name == "NAME.txt" else (folder / name).is_file())]


def read_captions(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """{file name: caption} for every picture. Raises ValueError for a picture without caption and a caption without picture."""
    found = caption_sources(folder)
    if not found:
        raise ValueError(f"{folder}: no captions; give one for all pictures, or write {', '.join(CAPTION_SOURCES)}")
    if len(found) > 1:
        raise ValueError(f"{folder}: captions in {' and in '.join(found)}; keep one of them")
    if found == ["NAME.txt"]:
        captions = captions_beside(paths, caption_texts(folder))
    elif found == ["metadata.jsonl"]:
        captions = captions_of_lines(folder / "metadata.jsonl")
    else:
        captions = captions_of_object(folder / "captions.json")
    names = {path.name for path in paths}
    if strangers := [name for name in captions if name not in names]:
        raise ValueError(f"{folder / found[0]}: a caption for {strangers[0]!r}, which is no picture of the folder")
    if missing := [path for path in paths if path.name not in captions]:
        raise ValueError(f"{missing[0]}: no caption in {found[0]}; {len(missing)} of {len(paths)} pictures have none")
    return captions


def captions_beside(paths: Sequence[Path], texts: Sequence[Path]) -> dict[str, str]:
    captions = {}
    for text in texts:
        owners = [path.name for path in paths if path.stem == text.stem]
        if not owners:
            raise ValueError(f"{text}: a caption without its picture; expected {text.stem}.png, or another ending of pictures, beside it")
        captions |= dict.fromkeys(owners, read_text(text))
    return captions


def captions_of_lines(path: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parsed(line, f"{path}, line {number}")
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}')
        captions[name] = text
    return captions


def captions_of_object(path: Path) -> dict[str, str]:
    captions = parsed(read_text(path), str(path))
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path}: expected one object {{"file name": "caption", ...}}')
    return captions


def parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


# --- pictures ---------------------------------------------------------------------------------------------------------


def load_picture(path: Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say, on white where it is transparent. Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a picture that can be read ({error}); save it anew, or take it out of the folder") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any kind of picture to three channels of 8 bits."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def fit(image: Image.Image, size: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Float[Tensor, "3 size size"]:
    """The largest square of an RGB picture at the model's size, in [-1, 1]; bicubic, and smoothed where it shrinks.

    crop: where the square lies along x and y, 0 at the left and top, 1 at the right and bottom. flip: mirrored left to right.
    Raises ValueError for a place outside 0..1.
    """
    if not all(0 <= place <= 1 for place in crop):
        raise ValueError(f"crop {crop}: both places must lie in 0..1; (0.5, 0.5) is the centre")
    side = min(image.size)
    left, top = (image.width - side) * crop[0], (image.height - side) * crop[1]
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels
