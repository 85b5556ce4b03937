"""Make sheet.webp, the picture sheet of the bundled scenes, from three openly licensed emoji families.

Cells of 128 x 128 pixels in reading order: the subjects in the order of subjects.json, three cells each, for noto, twemoji and fluent;
ten subjects a row, because a WebP is at most 16,383 pixels high. Each picture is cut to what is drawn, then scaled so that its longer
side is 128 pixels.

The art comes from npm archives (see LICENSES.md), which are too big to ship. Noto and Twemoji are vectors, drawn by resvg:

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @lobehub/fluent-emoji-3d@1.1.0
    pip install resvg-py==0.5.0
    python -m minidiff.scenes.make_sheet iconify-json-noto-1.2.9.tgz iconify-json-twemoji-1.2.5.tgz \
        lobehub-fluent-emoji-3d-1.1.0.tgz

The names in subjects.json follow emojibase-data 17.0.0 ("cat face" became cat, "lady beetle" ladybug).
The same archives, the same resvg and the same Pillow give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from minidiff.scenes.art import CELL, HERE, SUBJECTS_A_ROW

DRAWN = 512  # pixels a side at which vectors are drawn, before they are cut and scaled down
QUALITY = 92  # of the WebP: 1.9 MB, where lossless takes 4.1 MB


def emoji_code(name: str) -> str:
    """Return the hexadecimal code without FE0F, which the families use differently."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def read_vectors(archive: Path, codes: Iterable[str]) -> dict[str, Image.Image]:
    """Draw the RGBA pictures of `codes` from an npm archive of Iconify. Raises ValueError naming those that are missing."""
    with tarfile.open(archive) as tar:
        icons, chars = (json.loads(read_member(tar, f"package/{name}.json")) for name in ("icons", "chars"))
    names = {emoji_code(code): name for code, name in chars.items()}
    check_all(archive, codes, names)
    return {code: draw(icons, icons["icons"][names[code]]) for code in codes}


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """Read a file of an archive. Raises KeyError if it has none of that name."""
    file = tar.extractfile(name)
    assert file is not None, f"{name} is no file"
    return file.read()


def draw(icons: dict, icon: dict) -> Image.Image:
    """Draw one icon of an Iconify collection, DRAWN pixels wide; its box is the collection's where it has none of its own."""
    resvg_py = import_module("resvg_py")  # pip install resvg-py: nobody needs it who does not make the sheet
    box = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
    box = {name: icon.get(name, icons.get(name, default)) for name, default in box.items()}
    view = " ".join(str(side) for side in box.values())
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">{icon["body"]}</svg>'
    height = round(DRAWN * box["height"] / box["width"])
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=height))).convert("RGBA")


def read_pictures(archive: Path, codes: Iterable[str]) -> dict[str, Image.Image]:
    """Read the RGBA pictures of `codes` from an npm archive of pictures. Raises ValueError naming those that are missing."""
    found, wanted = {}, set(codes)
    with tarfile.open(archive) as tar:
        for member in tar:
            code = emoji_code(Path(member.name).stem)
            if member.isfile() and member.name.startswith("package/assets/") and code in wanted:
                found[code] = Image.open(io.BytesIO(read_member(tar, member.name))).convert("RGBA")
    check_all(archive, codes, found)
    return found


def check_all(archive: Path, codes: Iterable[str], found: Iterable[str]) -> None:
    """Raise ValueError naming the codes that are not among those found."""
    if missing := sorted(set(codes) - set(found)):
        raise ValueError(f"{archive} has no picture for {missing}; see the docstring for what to give")


def fit_cell(picture: Image.Image) -> Image.Image:
    """Cut to the visible part, scale its longer side to CELL, centre it in an empty cell."""
    visible = np.asarray(picture)[..., 3] > 8  # fainter than 8/255 is the soft rim of a shadow
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    picture = picture.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    cell = Image.new("RGBA", (CELL, CELL))
    # Pillow scales RGBA with premultiplied alpha, so no dark fringe comes from the transparent pixels.
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def make_sheet(noto: Path, twemoji: Path, fluent: Path) -> Image.Image:
    """Make the whole sheet, RGBA, from the three archives."""
    codes = [subject["code"] for subject in json.loads((HERE / "subjects.json").read_text())]
    families = [read_vectors(noto, codes), read_vectors(twemoji, codes), read_pictures(fluent, codes)]
    cells = [fit_cell(pictures[code]) for code in codes for pictures in families]
    columns = SUBJECTS_A_ROW * len(families)
    sheet = Image.new("RGBA", (CELL * columns, CELL * -(-len(cells) // columns)))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (CELL * (i % columns), CELL * (i // columns)))
    return sheet


def write_sheet(
    noto: tyro.conf.Positional[Path],
    twemoji: tyro.conf.Positional[Path],
    fluent: tyro.conf.Positional[Path],
    /,
    out: Path = HERE / "sheet.webp",
) -> None:
    """Make the picture sheet of the bundled scenes.

    Args:
        noto: npm archive (.tgz) of the noto pictures
        twemoji: npm archive of the twemoji pictures
        fluent: npm archive of the fluent pictures
        out: the file to write
    """
    sheet = make_sheet(noto, twemoji, fluent)
    sheet.save(out, quality=QUALITY, method=6)
    print(f"{out}: {sheet.width} x {sheet.height}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(write_sheet)
