"""Pictures of one subject to personalise a model with, as a person would take them: the same thing at several sizes and places.

    python -m minidiff.scenes.pictures tiger tiger-pictures --style fluent

The 20 held-out subjects are meant for this, which no training of the bundled model has shown; `--help` lists them.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from minidiff.pictures import save_png
from minidiff.scenes.art import COLOURS, STYLES, known, scaled_size, subject_names, subjects, visible_backgrounds
from minidiff.scenes.scenes import SIZE, Item, Scene, compose

SIZES = tuple(round(share * SIZE) for share in (0.91, 0.72, 0.81, 0.63, 0.86))  # pixels of the longer side, in turn


def subject_scenes(subject: str, style: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Compose scenes of the subject alone, each on another background from which it stands out, until the backgrounds are used up.

    Raises ValueError for an unknown subject or style, and for a count below 1.

    Args:
        subject: Any of the 130.
        style: Of STYLES.
        count: Number of scenes.
        rng: For backgrounds and places.
    """
    known("subject", subject, subjects())
    known("style", style, STYLES)
    if count < 1:
        raise ValueError(f"{count} pictures asked for; give at least 1")
    backgrounds = [name for name in COLOURS if name in visible_backgrounds(subject, style, None)]
    order = rng.permutation(len(backgrounds))
    scenes = []
    for i in range(count):
        px = SIZES[i % len(SIZES)]
        x, y = SIZE / 2 + (rng.random(2) - 0.5) * (SIZE - np.array(scaled_size(subject, style, px)))
        scenes.append(compose([Item(subject, px, (float(x), float(y)))], background=backgrounds[order[i % len(order)]], style=style))
    return scenes


def write_pictures(
    subject: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[Path],
    /,
    style: Literal["noto", "twemoji", "fluent"] = "fluent",
    count: int = 5,
    seed: int = 0,
) -> None:
    """Write the pictures, and print the folder.

    Args:
        subject: any of the 130; 20 are held out of the bundled model's training
        folder: made if it is not there; pictures in it of the same names are written over
        style: of the drawings
        count: how many
        seed: of backgrounds and places
    """
    scenes = subject_scenes(subject, style, count, np.random.default_rng(seed))
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes):
        save_png(Image.fromarray(scene.image), folder / f"{i}.png")
    print(folder)


if __name__ == "__main__":
    about = f"Write pictures of one subject, to personalise a model with. Held out of training: {', '.join(subject_names(held_out=True))}."
    try:
        tyro.cli(write_pictures, prog="python -m minidiff.scenes.pictures", description=about)
    except (ValueError, OSError) as error:
        print(f"minidiff: {error}", file=sys.stderr)
        sys.exit(2)
