"""Human preference: a sheet with two pictures per row in random order, a form to fill in, and the tally.

    two folders -> sheet.png, form.csv (to be filled in), key.json (which side is which) -> tally of the forms

As in Custom Diffusion's user study (Kumari et al. 2023, section 4.3), people see pairs and choose without knowing which method made which.
"""

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps

from minidiff.evaluation.folder import find_drawn_pictures
from minidiff.files import read_text, write_text
from minidiff.pictures import load_picture, save_png

ANSWERS = ("left", "right", "equal")
LABEL = 40  # pixels before each row, for its number
GAP = 8


@dataclass(frozen=True)
class Tally:
    """How often each folder's picture was chosen.

    preferred: share of the first folder among the answers that chose. low, high: its 95 % interval, Wilson's for the effective number of
    answers (see `dependence`).
    """

    first: int
    second: int
    equal: int
    preferred: float
    low: float
    high: float


def make_sheet(first: Path, second: Path, out: Path, seed: int = 0, size: int = 256) -> int:
    """Write the sheet, the form and the key for all pictures that both folders have by name. Returns the number of rows.

    Raises ValueError for folders without common names, and for an `out` that holds a sheet already.

    Args:
        first: A folder of pictures.
        second: Another one.
        out: The folder to write to.
        seed: Of the order within the rows.
        size: Pixels of each picture on the sheet.
    """
    found = [{path.name for path in find_drawn_pictures(folder)} for folder in (first, second)]
    names = sorted(found[0] & found[1])
    if not names:
        raise ValueError(f"{first} and {second} have no picture of the same name; make both with the same prompts and seeds")
    if (out / "key.json").exists():
        raise ValueError(f"{out} holds a sheet already; choose another folder")
    if alone := sorted(found[0] ^ found[1]):
        warnings.warn(f"in one of the two folders only, and left out: {', '.join(alone)}", stacklevel=2)
    out.mkdir(parents=True, exist_ok=True)
    swapped = np.random.default_rng(seed).random(len(names)) < 0.5
    sheet = Image.new("RGB", (LABEL + 2 * size + GAP, len(names) * (size + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, swap) in enumerate(zip(names, swapped)):
        draw.text((6, i * (size + GAP) + size // 2), str(i + 1), fill="black")
        for side, folder in enumerate((second, first) if swap else (first, second)):
            picture = ImageOps.pad(load_picture(folder / name), (size, size), color="white")
            sheet.paste(picture, (LABEL + side * (size + GAP), i * (size + GAP)))
    save_png(sheet, out / "sheet.png")
    form = io.StringIO(newline="")
    csv.writer(form, lineterminator="\n").writerows([("row", f"better ({', '.join(ANSWERS)})"), *((i + 1, "") for i in range(len(names)))])
    write_text(out / "form.csv", form.getvalue())
    key = {"first": str(first), "second": str(second), "names": names, "left is second": swapped.tolist()}
    write_text(out / "key.json", json.dumps(key, indent=1))
    return len(names)


def tally(key: Path, forms: Sequence[Path]) -> Tally:
    """Count the answers of filled forms.

    Raises ValueError for a file that is no key, a form given twice, and a row that is missing, empty, filled with something else, given
    twice, or not on the sheet.
    """
    swapped = read_key(key)["left is second"]
    if len({form.resolve() for form in forms}) < len(forms):
        raise ValueError(f"one of {', '.join(map(str, forms))} is given twice; give each person's form once")
    values = np.zeros((len(forms), len(swapped)))  # 1 the first folder's, -1 the second's, 0 neither
    for i, form in enumerate(forms):
        for row, answer in answers_of(form, len(swapped)).items():
            if answer != "equal":
                values[i, row] = -1 if (answer == "left") == swapped[row] else 1
    first, second, equal = (int((values == value).sum()) for value in (1, -1, 0))
    chosen = first + second
    low, high = wilson(first, chosen, dependence(values))
    return Tally(first, second, equal, first / chosen if chosen else math.nan, low, high)


def read_key(path: Path) -> dict[str, Any]:
    """Read the key of a sheet: "first" and "second", the two folders; "left is second", for each row.

    Raises ValueError for another file.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        key = {}
    kinds = {"first": str, "second": str, "left is second": list}
    whole = isinstance(key, dict) and all(isinstance(key.get(name), kind) for name, kind in kinds.items())
    if not whole or not all(isinstance(swap, bool) for swap in key["left is second"]):
        raise ValueError(f"{path}: not the key of a sheet; give the key.json that stands beside sheet.png")
    return key


def answers_of(form: Path, rows: int) -> dict[int, str]:
    """Read a form: what a person chose, by row from 0."""
    text = read_text(form).removeprefix("\ufeff")
    delimiter = ";" if text.partition("\n")[0].count(";") else ","  # spreadsheets of many countries write the former
    answers: dict[int, str] = {}
    for cells in list(csv.reader(text.splitlines(), delimiter=delimiter))[1:]:
        number, answer = (cells + ["", ""])[0].strip(), (cells + ["", ""])[1].strip().lower()
        if not number and not answer:
            continue
        if number not in map(str, range(1, rows + 1)):
            raise ValueError(f"{form}: a row {number!r}, but the sheet has rows 1 to {rows}; is it another sheet's form?")
        if int(number) - 1 in answers:
            raise ValueError(f"{form}: row {number} stands there twice")
        answers[int(number) - 1] = answer
    for row in range(rows):
        if answers.get(row, "") not in ANSWERS:
            raise ValueError(f"{form}, row {row + 1}: {answers.get(row, '')!r}; write {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}")
    return answers


def dependence(values: Float[np.ndarray, "forms rows"]) -> float:
    """Return the design effect: how many times larger the variance of the share is than for independent answers, at least 1.

    Answers to one row are correlated, and so are those of one person, so both are clusters (Cameron, Gelbach and Miller 2011); the effect
    is never smaller than that of either alone. values: 1 for the first folder, -1 for the second, 0 for neither.
    """
    chose = values != 0
    if not chose.any():
        return 1.0
    residuals = np.where(chose, (values > 0) - (values[chose] > 0).mean(), 0.0)
    alone = np.square(residuals).sum()
    by_row, by_person = (np.square(residuals.sum(axis=axis)).sum() for axis in (0, 1))
    return float(max(alone, by_row, by_person, by_row + by_person - alone) / alone) if alone else 1.0


def wilson(successes: int, count: int, times: float = 1.0, z: float = 1.96) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); 0..1 without answers.

    Args:
        successes: Answers for the first.
        count: All answers that chose.
        times: As many answers count as one.
        z: Quantile of the normal distribution.
    """
    if count == 0:
        return 0.0, 1.0
    p, n = successes / count, count / times
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
