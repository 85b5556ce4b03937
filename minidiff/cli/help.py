"""`--help` and `--help-all`: a command's example, what it does, and its flags with the values that they have by default.

    docstring or Method      -> example, text
    arguments or dataclasses -> rows of flags -> the rows that FIRST names, or with --help-all every row

The rows are made from what tyro parses: names, types, defaults and the lines under `Args:`. tyro's own page shows all flags at once.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from minidiff.trainers.methods.override import documented

HELP = ("-h", "--help")
HELP_ALL = "--help-all"
WIDTH, COLUMN = 100, 26  # of the page, and of a flag with its value
# The flags that --help shows, by command or by the first word of it; a command that is not named here shows all of its flags.
FIRST = {
    "generate": (
        *("prompts", "model", "negative-prompt", "steps", "sampler", "guidance-scale", "seed", "batch", "seeds", "size"),
        *("lora", "embedding", "image", "strength", "mask", "zoom", "out"),
    ),
    "train": (
        *("images", "token", "class-word", "prompt", "captions", "out", "model", "low-rank"),
        *("steps", "batch", "learning-rate", "rank", "text-encoder", "prior", "hint", "weights", "vectors", "precision", "sample-every"),
    ),
    "train from-scratch": ("out", "recipe", "init", "vae", "steps", "batch", "learning-rate", "scenes", "widths", "device", "threads"),
}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
POSITIONAL = get_args(tyro.conf.Positional[int])[1]
REPEATED = get_args(tyro.conf.UseAppendAction[int])[1]


@dataclass(frozen=True)
class FlagRow:
    """A row of --help. name: without dashes. metavar: "" of a flag without a value. default: "" where there is none to show."""

    name: str
    metavar: str
    help: str
    default: str
    positional: bool

    @property
    def title(self) -> str:
        """Return what is typed: "--steps INT", or "PROMPTS ..." of an argument without a name."""
        return (
            f"{self.name.upper()}{' ...' * self.metavar.endswith('...')}" if self.positional else f"--{self.name} {self.metavar}".rstrip()
        )


def flag_rows(target: Any) -> Iterator[FlagRow]:
    """Yield a row for each argument of a function or field of a dataclass, and those of the dataclasses among them."""
    hints, helps = get_type_hints(target, include_extras=True), documented(target)
    for name, default in _arguments(target):
        if is_dataclass(kind := hints[name]):
            yield from flag_rows(kind)
        else:
            yield _row(name, hints[name], default, helps.get(name, ""))


def _arguments(target: Any) -> Iterator[tuple[str, Any]]:
    if not is_dataclass(target):
        yield from ((name, parameter.default) for name, parameter in inspect.signature(target).parameters.items())
        return
    for field in fields(target):
        yield field.name, field.default if field.default_factory is MISSING else field.default_factory()


def _row(name: str, hint: Any, default: Any, help: str) -> FlagRow:
    kind, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    name = name.replace("_", "-")
    metavar, shown = _metavar(kind), _shown(default)
    for mark in marks:  # what tyro.conf.arg says
        name, metavar, help = (
            getattr(mark, "name", None) or name,
            getattr(mark, "metavar", None) or metavar,
            getattr(mark, "help", None) or help,
        )
        shown = shown if getattr(mark, "help_behavior_hint", None) is None else mark.help_behavior_hint
    if kind is bool:
        name, metavar, shown = f"no-{name}" if default is True else name, "", ""
    if REPEATED in marks:
        metavar, help = metavar.removesuffix(" ..."), f"{help} (may be given several times)"
    return FlagRow(name, metavar, help, shown, POSITIONAL in marks)


def _metavar(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "{" + ",".join(word for word in get_args(kind) if word is not None) + "}"
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    return METAVARS.get(kind, "VALUE")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or any(value is none for none in (None, MISSING, inspect.Parameter.empty)):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def describe_presets(values: Mapping[str, Any]) -> str:
    """Return what presets have for one flag: "300", or "bundled 300; sd1, sd2 1500" where they differ; "" where none has a value."""
    owners: dict[str, list[str]] = {}
    for preset, value in values.items():
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else _shown(value) or "none"
        owners.setdefault(text, []).append(preset)
    if len(owners) == 1:
        (text,) = owners
        return "" if text in ("none", "no") else text
    return "; ".join(f"{', '.join(presets)} {text}" for text, presets in owners.items())


def split_examples(text: str) -> tuple[list[str], str]:
    """Split a description into its examples, the indented lines that begin with minidiff, and the rest."""
    example = re.compile(r"^ {4}(minidiff .*)\n?", re.MULTILINE)
    return example.findall(text), re.sub(r"\n{3,}", "\n\n", example.sub("", text)).strip()


def format_help(name: str, about: str, target: Any, *, every: bool) -> str:
    """Format the page of a command.

    Args:
        name: of the command, as "train lora"
        about: its description, with examples as `split_examples` finds them
        target: what its arguments are parsed into
        every: show all flags, not only those that FIRST names
    """
    examples, text = split_examples(about)
    rows = list(flag_rows(target))
    first = None if every else FIRST.get(name) or FIRST.get(name.split()[0])
    shown = [row for row in rows if first is None or row.name in first]
    if first:
        shown.sort(key=lambda row: first.index(row.name))
    lines = [f"  {example}" for example in examples] + [""] * bool(examples)
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), WIDTH), ""]
    for row in shown:
        lines += _format_row(row.title, row.help + (f" [{row.default}]" if row.default else ""))
    if len(shown) < len(rows):
        lines += ["", f"{HELP_ALL} shows all {len(rows)} flags."]
    return "\n".join(lines)


def _format_row(title: str, text: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - COLUMN - 2, break_on_hyphens=False, break_long_words=False) or [""]
    head = f"  {title}"
    first = [f"{head:{COLUMN}}  {lines[0]}"] if len(head) <= COLUMN else [head, f"{'':{COLUMN}}  {lines[0]}"]
    return [*first, *(f"{'':{COLUMN}}  {line}" for line in lines[1:])]
