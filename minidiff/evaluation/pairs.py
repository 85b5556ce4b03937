"""Human preference: two pictures a row in random order, a form to fill, and the tally.

    two folders -> sheet.png, form.csv (to be filled), key.json (which side is which) -> tally of the filled forms

As in Custom Diffusion's user study (Kumari et al. 2023, section 4.3): people see pairs and choose, without knowing which method made which.
"""

import csv
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from minidiff.evaluation.folder import drawn_pictures
from minidiff.trainers.data import load_picture
from minidiff.viz import save_png

ANSWERS = ("left", "right", "equal")
LABEL = 40  # pixels before each row, for its number
GAP = 8


@dataclass(frozen=True)
class Tally:
    """preferred: of the answers that chose, the share that chose the first folder's picture; low, high: Wilson's 95 % interval of it."""

    first: int
    second: int
    equal: int
    preferred: float
    low: float
    high: float


def make_sheet(first: Path, second: Path, out: Path, seed: int = 0, size: int = 256) -> int:
    """Writes the sheet, the form and the key of all pictures of one name in both folders; returns how many rows.

    size: pixels of each picture on the sheet. Raises ValueError for folders without common names, and for an `out` that holds a sheet already.
    """
    found = [{path.name for path in drawn_pictures(folder)} for folder in (first, second)]
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
    with open(out / "form.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("row", f"better ({', '.join(ANSWERS)})"), *((i + 1, "") for i in range(len(names)))])
    key = {"first": str(first), "second": str(second), "names": names, "left is second": swapped.tolist()}
    (out / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    return len(names)


def tally(key: Path, forms: Sequence[Path]) -> Tally:
    """Counts filled forms. Raises ValueError for a row that is missing, not filled, or filled with something else."""
    swapped = json.loads(key.read_text(encoding="utf-8"))["left is second"]
    counts = {"first": 0, "second": 0, "equal": 0}
    for form in forms:
        with open(form, newline="", encoding="utf-8") as file:
            answers = {row[0].strip(): row[1].strip().lower() for row in list(csv.reader(file))[1:] if len(row) > 1}
        for i, swap in enumerate(swapped, start=1):
            answer = answers.get(str(i), "")
            if answer not in ANSWERS:
                raise ValueError(f"{form}, row {i}: {answer!r}; write {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}")
            counts["equal" if answer == "equal" else "second" if (answer == "left") == swap else "first"] += 1
    chosen = counts["first"] + counts["second"]
    return Tally(**counts, preferred=counts["first"] / chosen if chosen else math.nan, **dict(zip(("low", "high"), wilson(counts["first"], chosen))))


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927); all of 0..1 for nothing counted."""
    if count == 0:
        return 0.0, 1.0
    p = successes / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
