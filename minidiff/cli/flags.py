"""Flags made from option classes: every field is an optional flag, and its line under `Args:` is the flag's help.

    Settings(steps: int, ...) -> SettingsFlags(steps: int | None = None, ...) -> tyro -> {"steps": 200} -> override(preset, ...)

A flag that is not given leaves the preset's number, which depends on the model; --help (cli/help.py) shows those of all presets. Importing
this takes no time. tyro reads the types below.
"""

import inspect
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from functools import reduce, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from minidiff.cli.help import HELP, HELP_ALL, describe_presets, format_help
from minidiff.trainers.methods.options import YesNo
from minidiff.trainers.methods.override import Flat, flat_fields

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
Whole = int | None
Number = float | None
Text = str | None
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]
DTypes = Literal["auto", "float32", "bfloat16", "float16"]
Attentions = Literal["auto", "naive", "pytorch", "triton"]
YES_NO = {"yes": True, "no": False}


def flag_groups(options: type, taken: Iterable[str] = (), presets: "Mapping[str, object] | None" = None) -> dict[str, type]:
    """Make a class of optional flags for each dataclass in nested options, by the name of the field that holds it ("method" outside).

    taken: names that are flags already. A name that several fields have is one flag. presets: options by name, whose values --help shows.
    """
    names, groups = set(taken), dict[type, list[Flat]]()
    for flat in flat_fields(options):
        if flat.name not in names:
            names.add(flat.name)
            groups.setdefault(flat.owner, []).append(flat)
    return {("method", *flats[0].path)[-2]: _flag_class(owner, flats, presets or {}) for owner, flats in groups.items()}


def _flag_class(owner: type, flats: list[Flat], presets: Mapping[str, object]) -> type:
    fields = [(flat.name, *optional(flat, describe_presets(_values(flat, presets)))) for flat in flats]
    about = summary(owner).partition("\n\n")[0]
    return make_dataclass(f"{owner.__name__}Flags", fields, frozen=True, kw_only=True, namespace={"__doc__": about})


def _values(flat: Flat, presets: Mapping[str, object]) -> dict[str, object]:
    """Return what each preset has for a field; presets without the part that holds it are left out."""
    parts = {name: reduce(lambda part, key: part and getattr(part, key), flat.path[:-1], preset) for name, preset in presets.items()}
    return {name: getattr(part, flat.path[-1]) for name, part in parts.items() if part is not None and hasattr(part, flat.path[-1])}


def optional(flat: Flat, shown: str = "") -> tuple[Any, Any]:
    """Return the type of a flag, for tyro, and the default that means it is not given. shown: values of the presets."""
    kind = without_none(flat.hint)
    about: Any = tyro.conf.arg(help=flat.help, help_behavior_hint=shown, metavar="DIR" if kind is Path else None)
    if takes_yes_or_no(flat.hint):
        return Annotated[Literal[tuple(YES_NO)] | None, about], None
    if kind is bool:
        return Annotated[bool, about], False
    if get_origin(kind) is tuple and get_args(kind)[0] is not int:
        return Annotated[Several, about], ()
    return Annotated[kind | None, about], None


def without_none(hint: Any) -> Any:
    """Return the type that may be None; other types as they are."""
    return next(kind for kind in get_args(hint) if kind is not NoneType) if get_origin(hint) in (Union, UnionType) else hint


def takes_yes_or_no(hint: Any) -> bool:
    """Say whether a flag needs a word for False: where a preset may be True, or None means something else."""
    return hint == YesNo or (without_none(hint) is bool and hint is not bool)


def given(groups: Iterable[object], options: type) -> dict[str, object]:
    """Return the options' flags that were given, by flat names, as values of the fields."""
    values = {name: value for group in groups for name, value in vars(group).items()}
    found = {flat.name: flat for flat in flat_fields(options)}
    chosen = {name: value for name, value in values.items() if name in found and value is not None and value is not False and value != ()}
    return {name: YES_NO[value] if takes_yes_or_no(found[name].hint) else value for name, value in chosen.items()}


def command_class(parts: dict[str, Any]) -> type:
    """Make the class of a command's flags from its parts: classes of flags, or (type, default) for a single one."""
    fields = [(name, *part) if isinstance(part, tuple) else (name, part, field(default_factory=part)) for name, part in parts.items()]
    return make_dataclass("Command", fields, frozen=True, kw_only=True)


def summary(described: object) -> str:
    """Return a docstring up to its Args."""
    return (inspect.getdoc(described) or "").partition("Args:\n")[0].strip()


WORDS = {"fp16": "float16", "half": "float16", "fp32": "float32", "full": "float32", "bf16": "bfloat16", "gpu": "cuda"}
MISTAKES = (  # of tyro's messages: (pattern, what is said in its place)
    (r"Unrecognized options: (?P<given>--[^ ,=]+)", "{given} is no flag of this command{near}"),
    (r"Unrecognized options: (?P<given>[^|]*[^| ])", "{given}: no flag before it takes it"),
    (r"Missing from [^:]*: (?P<given>(?:--[\w-]+|[A-Z]+)) (?:[A-Z]+ )?(?P<help>.*?) \(required\)", "{given} is needed: {help}"),
    (r"Missing value for argument '(?P<given>-[^']+)'", "{given} needs a value behind it"),
    (
        r"invalid choice '(?P<value>.*?)' for argument '(?P<given>.*?)'\. Expected one of \((?P<choices>.*?)\)",
        "{given} {value}{near}: choose {choices}",
    ),
    (r"Error parsing (?P<given>\S+): .*literal for int\(\).*: '(?P<value>.*?)'", "{given} {value}: expected a whole number"),
    (r"Error parsing (?P<given>\S+): .*to float: '(?P<value>.*?)'", "{given} {value}: expected a number"),
)


def parse_flags(target: Any, name: str, about: str, args: list[str]) -> Any:
    """Parse arguments with tyro, or show the help. Raises ValueError, in one line with the nearest right word, for what it does not take.

    Args:
        target: a class, or a function, which is called with what standard error says kept back
        name: of the command
        about: for --help
        args: the command line
    """
    if asked := {*HELP, HELP_ALL} & {*args}:
        print(format_help(name, about, target, every=HELP_ALL in asked))
        sys.exit(0)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(target, prog=f"minidiff {name}", args=args, config=CONFIG)
    except SystemExit:
        raise ValueError(f"{mistake(said.getvalue())}; minidiff {name} {HELP_ALL} lists all flags") from None


def collect(function: Callable[..., None], name: str, args: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Parse the arguments that a function documents; return them by position and by name. Raises as `parse_flags` does."""

    @wraps(function)
    def record(*positional: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return positional, named

    return parse_flags(record, name, summary(function), args)


def mistake(text: str) -> str:
    """Return what tyro says of wrong arguments, without its box, in one line."""
    said = " ".join(re.sub("[─-]{9,}", " | ", re.sub("[│╭╮╰╯]", " ", text)).split())
    for pattern, words in MISTAKES:
        if found := re.search(pattern, said):
            values = found.groupdict()
            choices = [choice for choice in re.findall(r"'([^']*)'", values.get("choices", "")) if choice != "None"]
            if choices:
                near = WORDS.get(values["value"]) or next(iter(get_close_matches(values["value"], choices, 1)), "")
            else:
                near = next(iter(re.findall(r"Perhaps you meant:?\s+(--[\w-]+)", said)), "")
            return words.format_map(values | {"choices": ", ".join(choices), "near": f" (did you mean {near}?)" if near else ""})
    return said


def check_least(smallest: int, **values: float | None) -> None:
    """Raise ValueError for the first flag whose value is below the smallest that makes sense, or no number; None was not given."""
    for name, value in values.items():
        if value is not None and not smallest <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {smallest}")


def flag_name(text: str) -> str:
    """Return the name of a flag without its dashes and its value: "--guidance_scale=3" and "Guidance scale" are guidance-scale."""
    return text.removeprefix("--").partition("=")[0].lower().replace("_", "-").replace(" ", "-")
