"""The account of a file: every tensor is used, converted, kept unused, or ignored for a stated reason; otherwise there is one error.

A loader that skips what it does not know gives a model that draws noise, and no hint why. So names and shapes are compared with what
the model needs before a single weight is taken over.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor, nn

from minidiff.config import ModelConfig
from weights_loader.families import Family
from weights_loader.name_table import PartNames, TensorLocation, file_shapes, name_table


@dataclass
class Report:
    """What becomes of each tensor of a file, by its name; for ignored ones with the reason. Grows part by part.

    ignore: a pattern of tensors that the user does not miss, among those that are not known.
    extra: not computed with, but kept and written back when the model is saved.
    """

    family: Family
    config: ModelConfig
    ignore: re.Pattern[str] | None = None
    used: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)

    def add_part(self, part: nn.Module, names: PartNames, tensors: Mapping[str, Tensor]) -> dict[str, TensorLocation]:
        """Compare a part with the tensors that are its own. Return the locations of its parameters."""
        locations = name_table(part, names)
        parameters = part.state_dict()
        ours = {location.name: (parameters[name], location) for name, location in locations.items()}
        for name, expected in file_shapes(part, names).items():
            parameter, location = ours[name]
            matrix = parameter.dim() == 2 and location.qkv_index is None
            if name not in tensors:
                self.missing.append(name)
                continue
            shape = tuple(tensors[name].shape)
            if shape != expected and not (matrix and _without_kernel(shape) == _without_kernel(expected)):
                self.wrong_shape[name] = f"is {shape}, should be {expected}"
            elif location.qkv_index is not None:
                self.converted[name] = "stacked query, key and value, taken apart"
            elif location.transposed:
                self.converted[name] = "matrix that is applied from the right, transposed"
            elif matrix and len(shape) == 4:
                self.converted[name] = "1x1 convolution, taken as a matrix"
            else:
                self.used.append(name)
        self.add_rest([name for name in tensors if name not in ours])
        return locations

    def add_rest(self, names: list[str]):
        """Account for tensors that no part computes with."""
        for name in names:
            reason = next((reason for pattern, reason in self.family.ignored if re.search(pattern, name)), None)
            if reason:
                self.ignored[name] = reason
            elif self.family.keeps(name, self.config):
                self.extra.append(name)
            elif self.ignore is not None and self.ignore.search(name):
                self.ignored[name] = "left out, as ignore= (--ignore) asks"
            else:
                self.unexpected.append(name)

    def problem(self) -> str | None:
        """Say what keeps the file from being loaded: the counts, and of each kind the first names with the nearest known ones."""
        if not (self.missing or self.unexpected or self.wrong_shape):
            return None
        lines = [f"{len(self.missing)} keys missing, {len(self.unexpected)} unexpected, {len(self.wrong_shape)} of the wrong shape"]
        lines += some([f"missing {name}{nearest(name, self.unexpected)}" for name in self.missing[:SHOWN]], len(self.missing))
        known = self.missing or self.used
        lines += some([f"unexpected {name}{nearest(name, known)}" for name in self.unexpected[:SHOWN]], len(self.unexpected))
        lines += some([f"{name} {what}" for name, what in list(self.wrong_shape.items())[:SHOWN]], len(self.wrong_shape))
        return "\n".join(lines)

    def reasons(self) -> dict[str, int]:
        """Count the ignored tensors by reason."""
        return dict(Counter(self.ignored.values()))


SHOWN = 4  # names of each kind in an error


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1x1 convolution as that of a matrix: they are the same map, and files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def some(lines: list[str], count: int) -> list[str]:
    """Return the first lines of a list of `count`, indented, and say how many more there are."""
    shown = lines[:SHOWN]
    return [f"  {line}" for line in shown] + ([f"  ... and {count - len(shown)} more"] if count > len(shown) else [])


def nearest(name: str, others: list[str]) -> str:
    """Return the most similar of the other names, in brackets; nothing if none is similar."""
    near = get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
