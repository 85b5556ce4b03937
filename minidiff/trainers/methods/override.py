"""Flat names for nested options: `batch` for options.settings.batch, `prior_weight` for options.prior.weight.

The command line makes its flags from these names and their documentation; `override` changes a preset by them. A class may rename what is
inside it by a class variable FLAT_NAMES: {dotted path: new name, or None to leave the field out}.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, TypeVar, get_args, get_type_hints

Options = TypeVar("Options")


@dataclass(frozen=True)
class Flat:
    """A field of nested options under its flat name.

    Args:
        name: flat, as batch or prior_weight
        path: names of the fields that lead to it, as ("settings", "batch")
        owner: the dataclass that has the field
        hint: its type
        help: its line under `Args:` in the docstring of the class that names it
    """

    name: str
    path: tuple[str, ...]
    owner: type
    hint: Any
    help: str


def flat_fields(options: type) -> list[Flat]:
    """List the fields of a dataclass, and of the dataclasses in its fields, by flat names; two may have one name."""
    hints, helps, renamed = get_type_hints(options, include_extras=True), documented(options), getattr(options, "FLAT_NAMES", {})
    found = []
    for field in fields(options):
        hint = hints[field.name]
        part = next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)
        inside = flat_fields(part) if part else [Flat(field.name, (), options, hint, helps.get(field.name, ""))]
        for flat in inside:
            path = (field.name, *flat.path)
            name = renamed.get(".".join(path), flat.name)
            if name is not None:
                found.append(replace(flat, name=name, path=path, help=helps.get(name, flat.help)))
    return found


def documented(described: object) -> dict[str, str]:
    """Return what the docstring of a class or function says of each name under `Args:`."""
    _, _, args = (inspect.getdoc(described) or "").partition("Args:\n")
    return {name: " ".join(text.split()) for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args, flags=re.MULTILINE)}


def places(options: object) -> list[Flat]:
    """List the flat fields that these options have: those inside a part that is None are left out."""
    return [flat for flat in flat_fields(type(options)) if reduce(getattr, flat.path[:-1], options) is not None]


def override(options: Options, values: Mapping[str, object]) -> Options:
    """Return the options with each value wherever a field has its flat name; of several, those that are nested deepest.

    Names that the options do not have are passed over: {"prior": "none"} does nothing where there is no prior. Raises ValueError for what
    the options refuse.
    """
    found = [flat for flat in places(options) if flat.name in values]
    depth = {flat.name: max(len(other.path) for other in found if other.name == flat.name) for flat in found}
    return _replaced(options, {flat.path: values[flat.name] for flat in found if len(flat.path) == depth[flat.name]})


def _replaced(options: Any, changes: Mapping[tuple[str, ...], object]) -> Any:
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    parts = {path[0] for path in changes if len(path) > 1}
    inside = {part: {path[1:]: value for path, value in changes.items() if path[0] == part} for part in parts}
    return replace(options, **own, **{part: _replaced(getattr(options, part), below) for part, below in inside.items()})
