"""The command line: the table of commands, and the way from the arguments to one of them.

A command is a function, whose arguments and docstring are what `--help` shows, or a training method, whose flags are made from its
options. A new one is a file in this room and a line in `groups`. What a user can get wrong ends in one line and exit code 2
(failures.py). This room and bench/ are the only ones here that know weights_loader. Imports that take long are inside the commands that
need them.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain

from minidiff import __version__
from minidiff.cli import bench, evaluate, hint, lists, merge
from minidiff.cli.again import call_with_settings
from minidiff.cli.checkpoints import compare, convert, inspect
from minidiff.cli.completion import completion
from minidiff.cli.doctor import doctor
from minidiff.cli.failures import explain
from minidiff.cli.film import film
from minidiff.cli.flags import collect, summary
from minidiff.cli.from_scratch import ScratchFlags, from_scratch
from minidiff.cli.generate import generate
from minidiff.cli.help import HELP, HELP_ALL
from minidiff.cli.play import play
from minidiff.cli.prompt_edit import edit
from minidiff.cli.share import share
from minidiff.cli.train import describe, train
from minidiff.cli.verify import verify
from minidiff.trainers.methods.table import METHODS

TRACEBACK = "--traceback"  # of every command: where it ends with an error, show where that was raised
EXAMPLES = (
    'minidiff generate "a fox on a green background"',
    "minidiff train lora --images cat-pictures --token sks --class-word cat --out runs/cat",
    'minidiff generate "a photograph of an astronaut" --model v1-5-pruned-emaonly.safetensors --out astronaut.png',
)


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line or more, and the function that takes the arguments behind its name."""

    summary: str
    run: Callable[[list[str]], None]


Entry = Callable[..., None] | Command


def groups() -> dict[str, dict[str, Entry | Mapping[str, Entry]]]:
    """Return the table of commands, in groups. One that has several kinds, as `train lora`, is a table itself."""
    return {
        "Make pictures": {
            "generate": Command(summary(generate), partial(call_with_settings, generate, "generate")),
            "edit": edit,
            "film": film,
            "play": play,
            "hint": hint.COMMANDS,
        },
        "Teach": {
            "train": {name: Command(describe(method, name), partial(train, name)) for name, method in METHODS.items()}
            | {"from-scratch": Command(summary(ScratchFlags), from_scratch)},
            "share": share,
        },
        "Checkpoints and small files": {
            "inspect": inspect,
            "convert": convert,
            "compare": compare,
            "verify": verify,
            "merge": merge.COMMANDS,
            "extract": merge.extract,
            "compress": merge.compress,
        },
        "Measure": {
            "evaluate": evaluate.COMMANDS,
            "bench": bench.COMMANDS,
        },
        "Ask": {
            "list": lists.show,
            "doctor": doctor,
            "completion": completion,
        },
    }


def commands() -> dict[str, Command]:
    """Return all commands, by their names of one word, or two as "train lora"."""
    found: dict[str, Entry] = {}
    for name, entry in chain.from_iterable(group.items() for group in groups().values()):
        found |= {f"{name} {kind}": one for kind, one in entry.items()} if isinstance(entry, Mapping) else {name: entry}
    return {name: entry if isinstance(entry, Command) else _command(name, entry) for name, entry in found.items()}


def _command(name: str, function: Callable[..., None]) -> Command:
    return Command(summary(function), partial(parse, name, function))


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
    except BrokenPipeError:  # who reads, as head, has read enough; nothing is left to be flushed into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
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
    kinds = {name: command for name, command in known.items() if args and name.startswith(f"{args[0]} ")}
    rest = args[1:] if kinds else args
    if rest and rest[0] not in (*HELP, HELP_ALL):
        raise ValueError(unknown(args[0] if kinds else "", rest[0], list(kinds or known)))
    print(list_kinds(args[0], kinds) if kinds else list_groups(known), file=sys.stdout if rest else sys.stderr)
    sys.exit(0 if rest else 2)


def unknown(group: str, word: str, known: list[str]) -> str:
    """Return the message for a word that is no command, or no kind of the command `group`, with the nearest one of `known`."""
    names = dict.fromkeys(name.split()[-1] if group else name.split()[0] for name in known)
    near = [f"{group} {name}".strip() for name in get_close_matches(word, names, 1)]
    way_out = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}" if group else "minidiff --help lists all"
    return f"command {f'{group} {word}'.strip()!r} unknown; {way_out}"


def list_groups(known: Mapping[str, Command]) -> str:
    """Return the page of `minidiff --help`: examples, then a line for each command."""
    lines = [f"minidiff {__version__}: Stable Diffusion to read, run and retrain", *(f"  {example}" for example in EXAMPLES), ""]
    for title, group in groups().items():
        lines.append(title)
        for name in group:
            kinds = [one.split()[1] for one in known if one.startswith(f"{name} ")]
            text = " ".join(kinds) if kinds else known[name].summary.splitlines()[0]
            lines.append(f"  {name:11} {text}")
    return "\n".join([*lines, f"minidiff COMMAND --help shows more; {TRACEBACK} shows where an error was raised."])


def list_kinds(name: str, kinds: Mapping[str, Command]) -> str:
    """Return the page of a command that has several kinds, as `minidiff train --help`."""
    lines = [f"  {kind.split()[1]:18} {command.summary.splitlines()[0]}" for kind, command in kinds.items()]
    return "\n".join([*lines, "", f"minidiff {name} KIND --help shows an example and the flags."])
