"""The pictures of the scenes: subjects, their art in three styles, tints and backgrounds.

sheet.webp has cells of 128 x 128 pixels in reading order, one for each style of each subject of subjects.json; make_sheet.py made it,
LICENSES.md says whose art it is. Everything here is plain RGB from 0 to 255; no colour management.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

SIZE = 128  # pixels of a scene, a side; all lengths in a scene follow it
CELL = 128  # pixels of a cell of the sheet
SUBJECTS_A_ROW = 10  # of the sheet: one below the other they would be higher than the 16,383 pixels of a WebP
STYLES = ("noto", "twemoji", "fluent")  # the order of a subject's cells
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 165, 75),
    "blue": (50, 100, 220),
    "purple": (130, 60, 180),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "black": (30, 30, 34),
    "white": (245, 245, 245),
    "gray": (140, 140, 145),
}
# A tinted object keeps this RGB distance from its background: orange is not put on yellow, nor brown on red.
TINT_CONTRAST = 110.0
# An untinted object has at most this share of pixels within this RGB distance of its background.
NEAR, MOST_NEAR = 60.0, 0.5
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """One row of subjects.json: an everyday name, its class word, and its number, which says where its art stands in the sheet."""

    name: str
    class_name: str
    number: int
    held_out: bool


@functools.cache
def subjects() -> dict[str, Subject]:
    """Return all subjects by name, in the order of the sheet; 110 for training, 20 held out."""
    rows = json.loads((HERE / "subjects.json").read_text())
    return {row["name"]: Subject(row["name"], row["class"], i, row["held_out"]) for i, row in enumerate(rows)}


def subject_names(*, held_out: bool) -> tuple[str, ...]:
    """Return the names of the training subjects, or of the held-out ones."""
    return tuple(subject.name for subject in subjects().values() if subject.held_out == held_out)


def known(kind: str, value: str, choices) -> str:
    """Return `value`. Raises ValueError that lists the choices if it is none of them."""
    if value not in choices:
        raise ValueError(f"{kind} {value!r} unknown; choose {', '.join(choices)}")
    return value


@functools.cache
def sheet() -> UInt8[np.ndarray, "H W 4"]:
    """Open the whole sheet, RGBA."""
    return np.asarray(Image.open(HERE / "sheet.webp").convert("RGBA"))


@functools.cache
def art(subject: str, style: str) -> UInt8[np.ndarray, "H W 4"]:
    """Return one picture, RGBA, cut to what is drawn: its longer side is CELL."""
    row, column = divmod(subjects()[subject].number, SUBJECTS_A_ROW)
    x, y = CELL * (len(STYLES) * column + STYLES.index(style)), CELL * row
    cell = sheet()[y : y + CELL, x : x + CELL]
    rows, columns = np.flatnonzero(cell[..., 3].any(1)), np.flatnonzero(cell[..., 3].any(0))
    return cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def tint_picture(picture: UInt8[np.ndarray, "H W 4"], colour: str) -> UInt8[np.ndarray, "H W 4"]:
    """Tint a picture in one named colour: light and shade become darker and lighter tones of it."""
    base = np.array(COLOURS[colour], np.float32) / 255
    light = picture[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    shade = np.clip(light - np.average(light, weights=picture[..., 3]), -0.35, 0.35)[..., None]
    rgb = base + np.where(shade < 0, base, 1 - base) * shade
    return np.concatenate([(rgb * 255 + 0.5).astype(np.uint8), picture[..., 3:]], -1)


@functools.lru_cache(maxsize=1024)
def sprite(subject: str, style: str, colour: str | None) -> Image.Image:
    """Return the picture with premultiplied alpha, so that scaling draws no dark fringe from transparent pixels."""
    picture = art(subject, style)
    return Image.fromarray(picture if colour is None else tint_picture(picture, colour)).convert("RGBa")


def scaled_size(subject: str, style: str, px: int) -> tuple[int, int]:
    """Return (width, height) of the picture when its longer side is `px`."""
    height, width = art(subject, style).shape[:2]
    scale = px / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def paint_background(colour: str, shade: Sequence[float], gradient: float) -> Float32[np.ndarray, "H W 3"]:
    """Paint the colour plus `shade`, in [0, 255], times (1 - gradient) at the top to (1 + gradient) at the bottom."""
    rows = 1 + gradient * np.linspace(-1, 1, SIZE, dtype=np.float32)
    column = np.clip(rows[:, None] * (np.array(COLOURS[colour], np.float32) + np.asarray(shade, np.float32)), 0, 255)
    return np.repeat(column[:, None], SIZE, axis=1)


@functools.cache
def visible_backgrounds(subject: str, style: str, colour: str | None) -> tuple[str, ...]:
    """Return the backgrounds from which a picture stands out: a yellow moon is not put on yellow, nor a brown cat on red."""
    if colour is not None:
        return tuple(name for name, rgb in COLOURS.items() if np.linalg.norm(np.subtract(COLOURS[colour], rgb)) >= TINT_CONTRAST)
    picture = art(subject, style)
    pixels = picture[picture[..., 3] > 127][:, :3].astype(np.float32)
    near = {name: np.linalg.norm(pixels - np.array(rgb), axis=1) < NEAR for name, rgb in COLOURS.items()}
    return tuple(name for name in COLOURS if near[name].mean() <= MOST_NEAR)


def common_backgrounds(things: Iterable[tuple[str, str | None]], styles: Sequence[str] = STYLES) -> list[str]:
    """Return the backgrounds from which all of the things, each a subject and its tint or None, stand out in all of the styles."""
    seen = [visible_backgrounds(subject, style, tint) for subject, tint in things for style in styles]
    return [colour for colour in COLOURS if all(colour in one for one in seen)]
