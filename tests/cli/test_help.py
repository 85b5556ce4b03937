"""`--help`: examples first, the flags that everyone needs, the values they have by default; shell completion."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from minidiff.cli.flags import Several, parse_flags
from minidiff.cli.help import FIRST, WIDTH, FlagRow, describe_presets, flag_rows, split_examples
from minidiff.cli.main import commands, run
from tests.command import runner


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


def test_the_first_page_has_three_examples_and_every_command_in_thirty_lines(ask):
    code, out, err = ask("--help")
    assert (code, err) == (0, "") and len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 120
    examples = re.findall(r"^  (minidiff .*)$", out, flags=re.MULTILINE)
    assert len(examples) == 3
    for name in commands():
        assert re.search(rf"^  {name.split()[0]} .*{name.split()[-1] if ' ' in name else ''}", out, flags=re.MULTILINE), name
    assert "--traceback" in out
    assert ask() == (2, "", out)


@pytest.mark.parametrize("name", commands())
def test_each_page_begins_with_an_example_that_parses(ask, name, monkeypatch):
    code, out, err = ask(*name.split(), "--help")
    lines = out.splitlines()
    assert (code, err) == (0, "") and out.startswith(f"  minidiff {name}"), (out, err)
    assert max(map(len, lines[3:])) <= WIDTH and len(lines) <= 45
    parsed = []

    def parse_only(target, *args):
        parsed.append(parse_flags(target, *args))
        raise KeyboardInterrupt  # before anything is done

    for module in ("flags", "train", "from_scratch"):
        monkeypatch.setattr(f"minidiff.cli.{module}.parse_flags", parse_only)
    for example in (line for line in lines if line.startswith("  minidiff ")):
        with pytest.raises(KeyboardInterrupt):
            run(shlex.split(example)[1:])
    assert parsed


def test_flags_that_are_shown_first_are_there_and_the_rest_is_in_help_all(ask):
    for command, first in FIRST.items():
        names = [name for name in commands() if name.split()[0] == command or name == command]
        if command == "train":
            names.remove("train from-scratch")
        pages = {name: ask(*name.split(), "--help-all")[1] for name in names}
        for flag in first:
            assert any(re.search(rf"^  (--{flag}|{flag.upper()})\b", page, flags=re.MULTILINE) for page in pages.values()), flag
        for name, page in pages.items():
            short = ask(*name.split(), "--help")[1]
            flags, fewer = (re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE) for text in (page, short))
            assert set(fewer) < set(flags) and f"--help-all shows all {len(flags) + ('PROMPTS' in page) + ('OUT ' in page)} flags" in short


@dataclass
class Inside:
    """A part.

    Args:
        depth: of it
    """

    depth: int | None = 3


def command(
    files: tyro.conf.Positional[tuple[Path, ...]],
    /,
    rate: float = 5e-6,
    count: int = 0,
    kind: Literal["a", "b"] | None = None,
    against: bool = True,
    words: Several = (),
    place: Annotated[Path | None, tyro.conf.arg(metavar="DIR", name="where")] = None,
    inside: Inside = Inside(),
) -> None:
    """Do it.

    Args:
        files: to read
        rate: of it
        count: of them
        kind: which
        against: something
        words: more
        place: of it
    """


def test_rows_show_names_types_and_defaults():
    assert list(flag_rows(command)) == [
        FlagRow("files", "PATH ...", "to read", "", True),
        FlagRow("rate", "FLOAT", "of it", "5e-06", False),
        FlagRow("count", "INT", "of them", "0", False),
        FlagRow("kind", "{a,b}", "which", "", False),
        FlagRow("no-against", "", "something", "", False),
        FlagRow("words", "TEXT", "more (may be given several times)", "", False),
        FlagRow("where", "DIR", "of it", "", False),
        FlagRow("depth", "INT", "of it", "3", False),
    ]


def test_presets_are_told_apart_only_where_they_differ():
    assert describe_presets({"a": 3, "b": 3}) == "3"
    assert describe_presets({"a": 3, "b": 1e-4, "c": 3}) == "a, c 3; b 0.0001"
    assert describe_presets({"a": None, "b": ("x", "y")}) == "a none; b x y"
    assert describe_presets({"a": None, "b": None}) == describe_presets({"a": False}) == describe_presets({}) == ""
    assert describe_presets({"a": True, "b": False}) == "a yes; b no"


def test_examples_are_split_from_the_text():
    assert split_examples("It does.\n\n    minidiff it --now\n    minidiff it\n\nAnd more.") == (
        ["minidiff it --now", "minidiff it"],
        "It does.\n\nAnd more.",
    )


def test_the_models_own_numbers_are_the_families(ask):
    from minidiff.config import SD1, SD2, SDXL
    from weights_loader.families import FAMILIES

    page = " ".join(ask("generate", "--help")[1].split())
    assert (SD1.guidance_scale, SD2.guidance_scale, SDXL.guidance_scale) == (7.5, 7.5, 5)
    assert "default: 7.5 of Stable Diffusion 1 and 2, 5 of XL" in page
    sizes = {family.name: {family.config.image_size, *family.image_sizes.values()} for family in FAMILIES if not family.any_size}
    assert list(sizes.values()) == [{512}, {512, 768}, {1024}] and "512 of Stable Diffusion 1, 512 or 768 of 2, 1024 of XL" in page
