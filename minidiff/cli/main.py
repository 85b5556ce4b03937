"""The command line: `generate`, `edit`, `hint KIND`, `inspect`, `convert`, `compare`, `verify`, `train METHOD`, `merge`, `compress`,
`extract`, `evaluate WHAT`, `bench WHAT`.

A command is a function, whose arguments and docstring are what `--help` shows, or a training method, whose flags are made from its
options. What a user can get wrong ends in one line and exit code 2 (failures.py). This room and bench/ are the only ones here that know
weights_loader. Imports that take long are inside the commands that need them.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from minidiff import __version__
from minidiff.cli import bench, evaluate, hint, merge
from minidiff.cli.again import call_with_settings
from minidiff.cli.checkpoints import compare, convert, inspect
from minidiff.cli.failures import explain
from minidiff.cli.flags import collect, summary
from minidiff.cli.from_scratch import ScratchFlags, from_scratch
from minidiff.cli.generate import generate
from minidiff.cli.prompt_edit import edit
from minidiff.cli.train import train
from minidiff.cli.verify import verify
from minidiff.trainers.methods.table import METHODS

TRACEBACK = "--traceback"  # of every command: where it ends with an error, show where that was raised


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line or more, and the function that takes the arguments behind its name."""

    summary: str
    run: Callable[[list[str]], None]


def commands() -> dict[str, Command]:
    """Return all commands, by their names of one word, or two as "train lora"."""
    functions: dict[str, Callable[..., None]] = {
        "edit": edit,
        "inspect": inspect,
        "convert": convert,
        "compare": compare,
        "verify": verify,
        "compress": merge.compress,
        "extract": merge.extract,
        "merge lora": merge.merge_lora,
        "merge concepts": merge.merge_concepts,
        **{f"hint {name}": function for name, function in hint.COMMANDS.items()},
        **{f"evaluate {name}": function for name, function in evaluate.COMMANDS.items()},
        **{f"bench {name}": function for name, function in bench.COMMANDS.items()},
    }
    return {
        "generate": Command(summary(generate), partial(call_with_settings, generate, "generate")),
        **{name: Command(summary(function), partial(parse, name, function)) for name, function in functions.items()},
        **{f"train {name}": Command(method.summary, partial(train, name)) for name, method in METHODS.items()},
        "train from-scratch": Command(summary(ScratchFlags), from_scratch),
    }


def parse(name: str, function: Callable[..., None], args: list[str]) -> None:
    """Call a function with the arguments that it documents."""
    positional, named = collect(function, name, args)
    function(*positional, **named)


def main() -> None:
    """Run the `minidiff` command."""
    warnings.showwarning = lambda message, *rest: print(f"minidiff: {message}", file=sys.stderr)
    args = [arg for arg in sys.argv[1:] if arg != TRACEBACK]
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if TRACEBACK in sys.argv:
            traceback.print_exc()
        line, code = explain(error, " ".join(args[:2]))
        print(f"minidiff: {line}", file=sys.stderr)
        sys.exit(code)


def run(args: list[str]) -> None:
    """Run the command that the arguments name, or list the commands."""
    if args == ["--version"]:
        print(f"minidiff {__version__}")
        return
    known = commands()
    for length in (2, 1):
        if (name := " ".join(args[:length])) in known:
            known[name].run(args[length:])
            return
    group = {name: command for name, command in known.items() if args and name.startswith(f"{args[0]} ")}
    show_commands(args[:1] if group else [], group or known, args[1:] if group else args)


def show_commands(group: list[str], known: dict[str, Command], rest: list[str]) -> None:
    """List commands for --help, or end with exit code 2 where none is named. Raises ValueError for an unknown one."""
    if rest and rest[0] not in ("-h", "--help"):
        asked = " ".join([*group, rest[0]])
        prefix = "".join(f"{word} " for word in group)
        names = dict.fromkeys(name.removeprefix(prefix) if group else name.split()[0] for name in known)
        near = [prefix + name for name in get_close_matches(rest[0], names, 1)]
        way_out = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}" if group else "minidiff --help lists all"
        raise ValueError(f"command {asked!r} unknown; {way_out}")
    names = {name.removeprefix(" ".join(group)).strip(): command for name, command in known.items()}
    choices = ",".join(dict.fromkeys(name.split()[0] for name in names))
    lines = [f"  {name:24}  {command.summary.splitlines()[0]}" for name, command in names.items()]
    usage = f"usage: minidiff {' '.join([*group, ''])}{{{choices}}} ... [{TRACEBACK}]\n\n"
    print(usage + "\n".join(lines), file=sys.stdout if rest else sys.stderr)
    sys.exit(0 if rest else 2)
