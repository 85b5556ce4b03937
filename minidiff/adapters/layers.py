"""The layers that an adapter may change: their names, and which of them a pattern chooses."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from minidiff.pipeline import StableDiffusion

PARTS = ("unet", "text_encoder", "text_encoder_2")  # the last in models with two text encoders
Layer = nn.Linear | nn.Conv2d
Kind = TypeVar("Kind", bound=nn.Module)


def modules_of(sd: StableDiffusion, kinds: tuple[type[Kind], ...]) -> dict[str, Kind]:
    """Return the modules of some kinds in the U-Net and the text encoders, by their names with the part in front."""
    parts = [part for part in PARTS if part in sd.parts]
    return {f"{part}.{name}": m for part in parts for name, m in sd.parts[part].named_modules() if isinstance(m, kinds)}


def layers_of(sd: StableDiffusion) -> dict[str, Layer]:
    """Return the linear layers and convolutions of the U-Net and the text encoders, by their names with the part in front."""
    return modules_of(sd, (nn.Linear, nn.Conv2d))


def choose(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    r"""Return the names in which one of the regular expressions is found, in their own order.

    Raises ValueError for no pattern, one that is no regular expression, and one that is found nowhere, with the nearest names.
    """
    if not patterns:
        raise ValueError(r"no pattern chooses no layer; give one or more, such as 'cross_attention\.to_k$'")
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(f"pattern {pattern!r} matches no layer; {nearest(pattern, names)}")
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Name up to three of the layers that are most like a pattern, as the end of an error."""
    # A pattern is usually the end of a name, so it is compared with all ends; the first layer of each end stands for it.
    ends = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), name)
    near = get_close_matches(re.sub(r"[\\^$]", "", pattern), ends, n=3, cutoff=0.6)
    shown = dict.fromkeys(ends[end] for end in near) or names[:: max(1, len(names) // 3)][:3]
    return f"{'near' if near else 'there'} are {', '.join(shown)}"
