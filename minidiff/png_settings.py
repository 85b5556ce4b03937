"""The settings of a picture inside its PNG file, as Stable Diffusion's web interfaces write and read them.

    a red apple
    Negative prompt: green
    Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.0, Seed: 0, Size: 64x64, Model: "C:\\\\a, b.safetensors", ...

The text is in the chunk "parameters". A value with a comma, a colon, a quotation mark or a line break is written as a JSON string. A grid
of several pictures states the size of a single one. Prompts that this form cannot hold are written once more, as JSON, under PROMPTS.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from minidiff.pictures import UNREADABLE

NEGATIVE = "Negative prompt: "
FIRST = "Steps: "  # what the line of settings begins with
PROMPTS = "Prompts"  # of a grid of several prompts, or one that looks like the lines below it
DIGITS = 7  # of a size, at most


@dataclass(frozen=True)
class Parameters:
    """The text of a picture, taken apart: its prompts, the negative prompt, and the values by their names in web interfaces."""

    prompts: tuple[str, ...]
    negative_prompt: str
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """Return the (width, height) that the text states."""
        sides = self.values.get("Size", "").split("x")
        if len(sides) != 2 or not all(side.isdecimal() and len(side) <= DIGITS for side in sides):
            return None
        return int(sides[0]), int(sides[1])


def read_settings(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) in a PNG's text chunk "parameters", None without one."""
    return parse_parameters(read_parameters(path)[0])


def is_grid(path: Path) -> bool:
    """Return True for a picture several times as wide or high as its settings state, unless these mention upscaling.

    One that --zoom enlarged is compared with its enlarged size.
    """
    text, size = read_parameters(path)
    found = parse(text)
    if found is None or found.size is None or "upscale" in text.lower():
        return False
    zoom = int(text) if (text := found.values.get("Zoom", "")).isdecimal() and len(text) <= DIGITS else 1
    one = found.size[0] * zoom, found.size[1] * zoom
    return size != one and not any(side % own for side, own in zip(size, one))


def read_parameters(path: Path) -> tuple[str, tuple[int, int]]:
    """Return the text chunk "parameters" of a picture, and its (width, height)."""
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters", "")
            return text if isinstance(text, str) else "", image.size
    except UNREADABLE:
        return "", (0, 0)  # whoever reads its pixels says what is wrong with it


def parse_parameters(text: str) -> tuple[str, tuple[int, int]] | None:
    """Return the prompt and the (width, height) that the text states, None without them."""
    found = parse(text)
    return (" | ".join(found.prompts), found.size) if found and found.size else None


def parse(text: str) -> Parameters | None:
    """Take the text of a picture apart, of this program or a web interface, in linear time. Return None where no line states settings."""
    lines = text.split("\n")
    last = next((i for i in reversed(range(len(lines))) if lines[i].startswith(FIRST)), None)
    if last is None:
        return None
    negative = next((i for i in range(last) if lines[i].startswith(NEGATIVE)), last)
    values = parse_values(lines[last])
    prompts = _json_list(values.pop(PROMPTS, "")) or ("\n".join(lines[:negative]),)
    return Parameters(prompts, "\n".join(lines[negative:last]).removeprefix(NEGATIVE), values)


def parse_values(line: str) -> dict[str, str]:
    """Return the values of a line "name: value, name: value, ..."; a value is a JSON string, or goes on to the next comma."""
    values, place, decoder = {}, 0, json.JSONDecoder()
    while (colon := line.find(":", place)) >= 0:
        name, start = line[place:colon].strip(), colon + 1
        while line[start : start + 1] == " ":
            start += 1
        comma = line.find(",", start)
        end = comma if comma >= 0 else len(line)
        value = line[start:end].strip()
        if value.startswith('"'):
            with suppress(ValueError):  # a quotation mark that opens no string is part of the value
                value, end = decoder.raw_decode(line, start)
        values[name] = value
        place = following + 1 if (following := line.find(",", end)) >= 0 else len(line)
    return values


def _json_list(text: str) -> tuple[str, ...]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(one, str) for one in found) else ()


def picture_settings(prompts: Sequence[str], negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Format the settings of a picture: prompts, negative prompt, then names and values; None and False are left out.

    The settings begin with "Steps". A tuple of values is written as NAME, NAME 2, ...
    """
    values = {f"{name} {i}" if i > 1 else name: one for name, value in settings.items() for i, one in enumerate(_several(value), start=1)}

    def text(values: Mapping[str, object]) -> str:
        lines = [" | ".join(prompts), *([NEGATIVE + negative_prompt] if negative_prompt else [])]
        return "\n".join([*lines, ", ".join(f"{name}: {_quote(value)}" for name, value in values.items())])

    plain = parse(text(values))
    if plain and (plain.prompts, plain.negative_prompt) == (tuple(prompts), negative_prompt):
        return text(values)
    return text(values | {PROMPTS: json.dumps(list(prompts), ensure_ascii=False)})


def _several(value: object) -> tuple[object, ...]:
    several = value if isinstance(value, tuple) else (value,)
    return tuple(one for one in several if one is not None and one is not False)


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n\r') or text != text.strip() else text
