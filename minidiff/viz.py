"""Pictures side by side, and pictures with the settings that made them."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows, as near to a square as they come unless `columns` says otherwise; a single one is returned as it is.

    Raises ValueError for no picture, and for pictures of several sizes.
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
    """Raises ValueError for a name that is not a PNG's, FileNotFoundError where the folder does not exist."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; name it {path.with_suffix('.png').name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or choose another place")


def save_png(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Writes a PNG, whole or not at all. `parameters` goes into the text chunk of that name, where Stable Diffusion web interfaces look.

    Raises as `check_png` does.
    """
    check_png(path)
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
