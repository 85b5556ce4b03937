"""Picture files and pixels: open, crop to the model's size, convert, arrange in a grid, write as PNG.

file -> load_picture -> RGB picture -> fit -> pixels (3, size, size) in [-1, 1]
bytes (B, H, W, 3)  -> to_pixels -------------> pixels (B, 3, H, W) in [-1, 1]  -> pipeline.to_images -> grid -> save_png
"""

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from minidiff.files import atomic_write


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange pictures of one size in rows, as close to a square as possible unless `columns` is given. A single picture is returned as is.

    Raises ValueError for no pictures or pictures of different sizes.
    """
    if not images:
        raise ValueError("a grid of 0 pictures; give at least one")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"a grid of pictures of sizes {sizes}; give pictures of one size")
    if len(images) == 1:
        return images[0]
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def check_png(path: Path) -> None:
    """Raise ValueError for a name that does not end in .png, FileNotFoundError if the folder does not exist."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; name it {path.with_suffix('.png').name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or choose another place")


def save_png(image: Image.Image, path: Path, parameters: str | None = None, hint: str | None = None) -> None:
    """Write a PNG, whole or not at all. Raises like `check_png`.

    Args:
        image: the picture.
        path: of the file.
        parameters: the settings that made the picture, for the text chunk of that name, where Stable Diffusion web interfaces look.
        hint: which kind of hint the picture is, for a text chunk that minidiff reads (see hints.py).
    """
    check_png(path)
    info = PngImagePlugin.PngInfo()
    for name, text in (("parameters", parameters), ("hint", hint)):
        if text is not None:
            info.add_text(name, text)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=info)


ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of files that must be pictures; others are looked into
# What is read, whatever the name; .tga by its name alone, for it begins like nothing in particular.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "PPM", "GIF", "TIFF", "JPEG2000", "AVIF")
MOST_PIXELS = 64_000_000  # of a picture: what decoding takes is 4 bytes for each, and a file of 20 kB can ask for gigabytes
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises for broken files


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder, sorted by name. Raises FileNotFoundError or NotADirectoryError without a folder."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; give one with pictures in it")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder with the pictures")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in entries if path.is_file() and (path.suffix.lower() in ENDINGS or _format_of(path))]
    if inner := [path.name for path in entries if path.is_dir()]:
        warnings.warn(f"{folder}: its sub-folders are not read: {', '.join(inner)}", stacklevel=3)
    others = [path for path in entries if path not in pictures and not path.is_dir() and path.suffix != ".txt" and path.name not in TEXTS]
    if others:
        shown = ", ".join(f"{path.name} (a link to nothing)" if not path.exists() else path.name for path in others)
        warnings.warn(f"{folder}: not read, for no picture or of another format: {shown}; save pictures as .png or .jpg", stacklevel=3)
    if hidden := [path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix.lower() in ENDINGS]:
        warnings.warn(f"{folder}: hidden pictures are not read: {', '.join(sorted(hidden))}", stacklevel=3)
    return pictures


TEXTS = ("metadata.jsonl", "captions.json", "made.json")  # captions, and what a folder was filled with


def _format_of(path: Path) -> str | None:
    """Return the format of a picture that can be read, by its first bytes; None for any other file."""
    Image.init()  # a Pillow without one of the formats must not be asked for it
    formats = [name for name in FORMATS if name in Image.OPEN] + ["TGA"] * (path.suffix.lower() == ".tga")
    try:
        with Image.open(path, formats=formats) as image:
            return image.format
    except UNREADABLE:
        return None


def check_picture(path: Path, size: int) -> None:
    """Raise ValueError for a picture that cannot be read or would be enlarged more than twice."""
    width, height = load_picture(path).size
    if 2 * min(width, height) < size:
        raise ValueError(
            f"{path}: {width} x {height} pixels are too few to learn {size} x {size} from; give at least {-(-size // 2)} a side"
        )


def load_picture(path: Path) -> Image.Image:
    """Open a picture in RGB, rotated by its EXIF data, on white where it is transparent. Raises like `open_picture`."""
    return open_picture(path, to_rgb)


def open_picture(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Open a picture, rotate it by its EXIF data and convert it.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS // 10**6} megapixels are read")
            return convert(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such picture; the path is looked up from the folder you are in") from error
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a picture that can be read ({error}); save it anew, smaller if need be, or leave it out") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to three channels of 8 bits."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def fit(
    image: Image.Image, size: int | tuple[int, int], *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Float[Tensor, "3 H W"]:
    """Crop the largest part of a shape from an RGB picture and resize it: bicubic, antialiased where it shrinks, in [-1, 1].

    Raises ValueError for a `crop` outside 0..1.

    Args:
        image: In RGB.
        size: Pixels a side, or (width, height).
        crop: Where the part lies along x and y: 0 is left and top, 1 right and bottom.
        flip: Mirror left to right.
    """
    if not all(0 <= place <= 1 for place in crop):
        raise ValueError(f"crop {crop}: both places must lie in 0..1; (0.5, 0.5) is the centre")
    size = (size, size) if isinstance(size, int) else size
    ratio = size[0] / size[1]
    narrow = image.width / size[0] <= image.height / size[1]
    width, height = (image.width, image.width / ratio) if narrow else (image.height * ratio, image.height)
    left, top = (image.width - width) * crop[0], (image.height - height) * crop[1]
    box = (max(left, 0), max(top, 0), min(left + width, image.width), min(top + height, image.height))  # within it, rounding aside
    part = image.resize(size, Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels


def to_pixels(images: UInt8[np.ndarray, "B H W 3"] | UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Convert pictures of bytes to floats in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
