"""The settings of a picture inside its PNG file, as Stable Diffusion's web interfaces write and read them.

    a red apple
    Negative prompt: green
    Steps: 30, Sampler: ddim, CFG scale: 4.0, Seed: 0, Size: 64x64, ...

The text is in the chunk "parameters". A grid of several pictures states the size of a single one.
"""

import re
from pathlib import Path

from PIL import Image

from minidiff.pictures import UNREADABLE

SIZE = re.compile(r"\bSize: (\d{1,7})x(\d{1,7})")


def read_settings(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) in a PNG's text chunk "parameters", None without one."""
    return parse_parameters(read_parameters(path)[0])


def is_grid(path: Path) -> bool:
    """Return True for a picture several times as wide or high as its settings state, unless these mention upscaling."""
    text, size = read_parameters(path)
    settings = parse_parameters(text)
    if settings is None or size == settings[1] or "upscale" in text.lower():
        return False
    return not any(side % one for side, one in zip(size, settings[1]))


def read_parameters(path: Path) -> tuple[str, tuple[int, int]]:
    """Return the text chunk "parameters" of a picture, and its (width, height)."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters", ""), image.size
    except UNREADABLE:
        return "", (0, 0)  # whoever reads its pixels says what is wrong with it


def parse_parameters(text: str) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) that the text states, None without them."""
    lines = text.split("\n")  # one pass: a pattern over all of a long text can take for ever
    for number, line in enumerate(lines[1:], start=1):
        if line.startswith("Steps: ") and (size := SIZE.search(line)):
            negative = (i for i in range(1, number) if lines[i].startswith("Negative prompt: "))
            return "\n".join(lines[: next(negative, number)]), (int(size[1]), int(size[2]))
    return None


def picture_settings(prompt: str, negative_prompt: str, settings: dict[str, object]) -> str:
    """Format the settings of a picture as web interfaces do: prompt, negative prompt, then names and values that were set."""
    lines = [prompt, f"Negative prompt: {negative_prompt}"] if negative_prompt else [prompt]
    values = [f"{name}: {value}" for name, value in settings.items() if value is not None and value is not False]
    return "\n".join([*lines, ", ".join(values)])
