"""`minidiff hint KIND`: a picture to the hint that a ControlNet is shown (hints.py)."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minidiff.cli.endings import WEB, finish
from minidiff.cli.flags import Whole
from minidiff.cli.model import print_notes
from minidiff.cli.names import free_path

if TYPE_CHECKING:
    from PIL import Image

Out = Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")]


def canny(picture: tyro.conf.Positional[Path], /, out: Out = None, size: Whole = None, low: float = 100, high: float = 200) -> None:
    """Draw thin edges, white on black.

        minidiff hint canny photo.jpg --size 512 --out edges.png

    Args:
        picture: a photograph or a drawing
        out: a .png file, named after the picture by default
        size: its shorter side is brought to this many pixels first; lines are one pixel wide
        low: an edge ends where the gradient falls below this, 0 to 2040
        high: and is kept if it reaches this anywhere
    """
    from minidiff import hints

    make("canny", picture, out, size, lambda pixels: hints.canny(pixels, low, high))


def scribble(
    picture: tyro.conf.Positional[Path], /, out: Out = None, size: Whole = None, low: float = 50, high: float = 100, width: Whole = None
) -> None:
    """Draw thick lines, as if by hand, along the edges of the blurred picture.

        minidiff hint scribble photo.jpg --size 512 --out scribble.png

    Args:
        picture: a photograph or a drawing
        out: a .png file, named after the picture by default
        size: its shorter side is brought to this many pixels first
        low: as of canny, after the blur
        high: as of canny, after the blur
        width: of the lines, in pixels; 1/85 of the shorter side by default
    """
    from minidiff import hints

    make("scribble", picture, out, size, lambda pixels: hints.scribble(pixels, low, high, width))


def tile(picture: tyro.conf.Positional[Path], /, out: Out = None, size: Whole = None, factor: int = 8) -> None:
    """Blur away the details, which a tile ControlNet invents.

        minidiff hint tile small.png --size 512 --out tile.png

    Args:
        picture: a photograph or a drawing
        out: a .png file, named after the picture by default
        size: its shorter side is brought to this many pixels first
        factor: this many pixels a side become one
    """
    from minidiff import hints

    make("tile", picture, out, size, lambda pixels: hints.tile(pixels, factor))


def inpaint(picture: tyro.conf.Positional[Path], /, mask: Path, out: Out = None, size: Whole = None) -> None:
    """Cut a hole, which an inpainting ControlNet fills.

        minidiff hint inpaint photo.jpg --mask mask.png --out hole.png

    Args:
        picture: a photograph or a drawing
        mask: a picture of the same size, white in the hole
        out: a .png file, named after the picture by default
        size: its shorter side is brought to this many pixels first
    """
    import numpy as np

    from minidiff import hints
    from minidiff.pictures import load_picture

    hole = load_picture(mask)
    if hole.size != load_picture(picture).size:
        (w, h), (W, H) = hole.size, load_picture(picture).size
        raise ValueError(f"{mask}: a mask of {w} x {h} pixels for a picture of {W} x {H}; give one of the picture's size")
    holes = np.asarray(shrink(hole, size).convert("L"))
    make("inpaint", picture, out, size, lambda pixels: hints.inpaint(pixels, holes))


def make(kind: str, picture: Path, out: Path | None, size: int | None, convert) -> None:
    """Make a hint and write it.

    Args:
        kind: of the hint
        picture: of the file
        out: as in `canny`
        size: as in `canny`
        convert: 8-bit pixels (H, W, 3) -> those of the hint
    """
    import numpy as np
    from PIL import Image

    from minidiff.hints import looks_like_lines
    from minidiff.pictures import check_png, load_picture, save_png

    out = out or free_path(Path(f"{picture.stem}-{kind}.png"))
    check_png(out)
    image = load_picture(picture)
    with Image.open(picture) as file:
        if kind in ("canny", "scribble") and looks_like_lines(file):
            print_notes([f"{picture}: a hint already, it seems; give it to --control as it is"])
    save_png(Image.fromarray(convert(np.asarray(shrink(image, size)))), out, hint=kind)
    use = f'minidiff generate "..." --model FILE --control {shlex.quote(str(out))} --controlnet FILE'
    finish(out, f"a {kind} hint", use=use, read_by=f"{WEB}, diffusers")


def shrink(image: "Image.Image", size: int | None) -> "Image.Image":
    """Bring the shorter side to a size: by area where it shrinks, by Lanczos where it grows, as the authors' code does."""
    from PIL import Image

    from minidiff.pictures import MOST_PIXELS

    if size is None:
        return image
    if size < 1:
        raise ValueError(f"--size {size}: at least 1 pixel")
    scale = size / min(image.size)
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(f"--size {size}: {width} x {height} pixels; at most {MOST_PIXELS // 10**6} megapixels are made")
    return image.resize((width, height), how)


COMMANDS = {"canny": canny, "scribble": scribble, "tile": tile, "inpaint": inpaint}
