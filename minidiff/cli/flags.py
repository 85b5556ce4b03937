"""Flags made from option classes: every field is an optional flag, and its line under `Args:` is the flag's help.

    Settings(steps: int, ...) -> SettingsFlags(steps: int | None = None, ...) -> tyro -> {"steps": 200} -> override(preset, ...)

A flag that is not given leaves the preset's number, which depends on the model and is not known when --help is shown. Importing this
takes no time. tyro reads the types below.
"""

import inspect
import io
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from minidiff.trainers.methods.options import YesNo
from minidiff.trainers.methods.override import Flat, flat_fields

UNSET = ""  # shown behind a flag's help, in place of a default
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=UNSET)]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=UNSET)]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=UNSET)]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=UNSET)]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=UNSET)]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]
DTypes = Literal["auto", "float32", "bfloat16", "float16"]
Attentions = Literal["auto", "naive", "pytorch", "triton"]
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "DIR"}
YES_NO = {"yes": True, "no": False}


def flag_groups(options: type, taken: Iterable[str] = ()) -> dict[str, type]:
    """Make a class of optional flags for each dataclass in nested options, by the name of the field that holds it ("method" outside).

    taken: names that are flags already. A name that several fields have is one flag.
    """
    names, groups = set(taken), dict[type, list[Flat]]()
    for flat in flat_fields(options):
        if flat.name not in names:
            names.add(flat.name)
            groups.setdefault(flat.owner, []).append(flat)
    return {("method", *flats[0].path)[-2]: _flag_class(owner, flats) for owner, flats in groups.items()}


def _flag_class(owner: type, flats: list[Flat]) -> type:
    fields = [(flat.name, *optional(flat)) for flat in flats]
    about = summary(owner).partition("\n\n")[0]
    return make_dataclass(f"{owner.__name__}Flags", fields, frozen=True, kw_only=True, namespace={"__doc__": about})


def optional(flat: Flat) -> tuple[Any, Any]:
    """Return the type of a flag, for tyro, and the default that means it is not given."""
    kind = without_none(flat.hint)
    if takes_yes_or_no(flat.hint):
        return choice(tuple(YES_NO), flat.help), None
    if kind is bool:
        return Annotated[bool, tyro.conf.arg(help=flat.help, help_behavior_hint=UNSET)], False
    if get_origin(kind) is Literal:
        return choice(get_args(kind), flat.help), None
    if get_origin(kind) is tuple and get_args(kind)[0] is int:
        return argument(kind, "INT [INT ...]", flat.help), None
    if get_origin(kind) is tuple:
        return Annotated[Several, tyro.conf.arg(help=flat.help)], ()
    return argument(kind, METAVARS[kind], flat.help), None


def without_none(hint: Any) -> Any:
    """Return the type that may be None; other types as they are."""
    return next(kind for kind in get_args(hint) if kind is not NoneType) if get_origin(hint) in (Union, UnionType) else hint


def takes_yes_or_no(hint: Any) -> bool:
    """Say whether a flag needs a word for False: where a preset may be True, or None means something else."""
    return hint == YesNo or (without_none(hint) is bool and hint is not bool)


def argument(kind: Any, metavar: str, help: str) -> Any:
    """Return an optional type with what --help shows of it."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint=UNSET)]


def choice(words: tuple[str, ...], help: str) -> Any:
    """Return an optional type that is one of some words."""
    return argument(Literal[words], "{" + ",".join(words) + "}", help)


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
    """Parse arguments with tyro. Raises ValueError, in one line with the nearest right word, for what it does not take.

    Args:
        target: a class, or a function, which is called with what standard error says kept back
        name: of the command
        about: for --help
        args: the command line
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(target, prog=f"minidiff {name}", description=about, args=args, config=CONFIG)
    except SystemExit as error:
        if not error.code:
            raise
    raise ValueError(f"{mistake(said.getvalue())}; minidiff {name} --help lists all flags")


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


def flag_name(text: str) -> str:
    """Return the name of a flag without its dashes and its value: "--guidance_scale=3" and "Guidance scale" are guidance-scale."""
    return text.removeprefix("--").partition("=")[0].lower().replace("_", "-").replace(" ", "-")
