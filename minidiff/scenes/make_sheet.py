"""Make sheet.webp, the picture sheet of the bundled scenes, from three openly licensed emoji families.

One row of 64 x 64 cells per subject, in the order of subjects.json; the columns are noto, twemoji and fluent.
Each picture is cut to what is drawn, then scaled so that its longer side is 64 pixels.

The art comes from npm archives (see LICENSES.md), which are too big to ship:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python -m minidiff.scenes.make_sheet emoji-datasource-google-16.0.0.tgz \
        emoji-datasource-twitter-16.0.0.tgz lobehub-fluent-emoji-3d-1.1.0.tgz

The names in subjects.json follow emojibase-data 17.0.0 ("cat face" became cat, "lady beetle" ladybug).
The same archives and the same Pillow give the same bytes.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

CELL = 64
HERE = Path(__file__).parent
# Folder of the pictures inside each archive, in the order of the sheet's columns.
FOLDERS = {
    "noto": "package/img/google/64/",
    "twemoji": "package/img/twitter/64/",
    "fluent": "package/assets/",
}


def emoji_code(file_name: str) -> str:
    """Return the hexadecimal code of a picture's file name without FE0F, which the families use differently."""
    return "-".join(part for part in Path(file_name).stem.lower().split("-") if part != "fe0f")


def read_pictures(archive: Path, folder: str, codes: set[str]) -> dict[str, Image.Image]:
    """Read the RGBA pictures of `codes` from one npm archive. Raises ValueError that names those that are missing."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            wanted = member.isfile() and member.name.startswith(folder) and emoji_code(member.name) in codes
            if wanted and (file := tar.extractfile(member)) is not None:
                found[emoji_code(member.name)] = Image.open(io.BytesIO(file.read())).convert("RGBA")
    if missing := sorted(codes - found.keys()):
        raise ValueError(f"{archive} has no {folder} picture for {missing}; see the docstring for what to give")
    return found


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


def make_sheet(archives: list[Path]) -> Image.Image:
    """Make the whole sheet, RGBA, (64 * subjects) high and (64 * styles) wide; archives in the order of FOLDERS."""
    codes = [subject["code"] for subject in json.loads((HERE / "subjects.json").read_text())]
    sheet = Image.new("RGBA", (CELL * len(FOLDERS), CELL * len(codes)))
    for column, (archive, folder) in enumerate(zip(archives, FOLDERS.values(), strict=True)):
        pictures = read_pictures(archive, folder, set(codes))
        for row, code in enumerate(codes):
            sheet.paste(fit_cell(pictures[code]), (column * CELL, row * CELL))
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
    sheet = make_sheet([noto, twemoji, fluent])
    sheet.save(out, lossless=True, quality=100, method=6)
    print(f"{out}: {sheet.width} x {sheet.height}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(write_sheet)
