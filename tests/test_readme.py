"""The READMEs: their commands, their Python, their links and the messages that they explain are those of the project."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest

from minidiff.cli.help import HELP, HELP_ALL
from minidiff.cli.main import commands
from minidiff.markdown import format_seconds
from minidiff.trainers.methods.table import METHODS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (".github", "lessons", "minidiff", "tests", "weights_loader")
PATHS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *(path for one in FOLDERS for path in (ROOT / one).rglob("README.md"))]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}


def blocks(text: str, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def marked_commands() -> list[str]:
    return re.findall(r"^<!-- run -->\n```bash\n(.*?)\n```", README, flags=re.MULTILINE | re.DOTALL)


def typed_commands(text: str) -> list[list[str]]:
    """The words of every command line in a document, in blocks and in the text; the parts of `a && b` apart, and without comments."""
    lines = [line for block in blocks(text, "bash|sh") for line in block.splitlines()]
    lines += re.findall(r"^    (minidiff .*)", text, flags=re.MULTILINE)  # indented
    lines += re.findall(r"`(minidiff [a-z][^`]*--[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows in a text, heads included and rules left out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


def measured(name: str) -> dict[str, dict]:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())["results"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_two_commands_do_everything_on_a_fresh_machine():
    picture, tests = marked_commands()
    assert picture.startswith("python3 -m venv") and "pip install" in picture and "minidiff generate" in picture
    assert tests.startswith("python3 -m venv") and "pip install" in tests and "pytest" in tests
    assert "\n" not in picture + tests  # each is one line, to be pasted
    assert not re.search(r"pip install\b.* -q", picture + tests)  # gigabytes are downloaded: pip shows how far it is
    assert "5.5 GB" in README.split("<!-- run -->")[0]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 160


def test_the_prompts_below_the_picture_are_those_that_made_it():
    """The model card has the command."""
    name = re.search(r'src="([^"]+)"', README)[1]
    made = next(words for words in typed_commands(DOCUMENTS["weights_loader/bundled/README.md"]) if words[-1] == Path(name).name)
    below = README.split(f'src="{name}"')[1].split("\n\n")[1]
    assert re.findall(r'"([^"]+)"', below) == made[2 : made.index("--out")]


def test_the_table_of_methods_has_them_all():
    assert re.findall(r"^\| `([a-z-]+)` \|", README.split("## Methods")[1].split("\n## ")[0], re.MULTILINE) == list(METHODS)


def test_the_table_of_correctness_is_the_worst_of_the_parity_tables_rows():
    all_parts = table_rows(DOCUMENTS["tests/parity/README.md"])
    rows = table_rows(README.split("## Is it right?")[1].split("\n## ")[0])
    assert len(rows) == 5 and all_parts[0] == ["part", "reference", "largest error, float32", "float64", "test"]
    for part, _, *told in rows[1:]:
        found = [row for row in all_parts if row[0].startswith(part.split(",")[0].removesuffix("s"))]
        assert [f"{max(float(row[i] or 0) for row in found):.1e}".replace("0.0e+00", "0") for i in (2, 3)] == told, part


@pytest.mark.parametrize("name", ["step-cpu", "image-cpu", "train-cpu", "step-cpu-avx512"])
def test_the_benchmarks_rows_are_those_of_the_record(name):
    rows = {
        label.lower(): cells
        for label, *cells in table_rows(DOCUMENTS["minidiff/bench/README.md"].split(f"benchmarks/{name}.json")[1].split("\n\n")[1])
    }
    record = measured(name)
    assert list(rows)[1:] == list(record)
    for contender, one in record.items():
        assert rows[contender][0] == format_seconds(median(one["rounds"])), contender
        assert f"{one['memory'] / 1e9:.2f} GB" in rows[contender], contender


def test_the_table_of_speed_is_that_of_the_records():
    head, *rows = table_rows(README.split("## How fast is it?")[1].split("\n## ")[0])
    names = [[f"{prefix}{contender}" for contender in head[1:]] for prefix in ("", "", "lora: ")]
    for row, contenders, record in zip(rows, names, map(measured, ("step-cpu", "image-cpu", "train-cpu")), strict=False):
        assert row[1:] == [format_seconds(median(record[one]["rounds"])) if one in record else "" for one in contenders]
    loaded = json.loads((BENCHMARKS / "load.json").read_text())["cases"][0]
    assert loaded["case"] == {"kind": ".safetensors", "stored": "float32", "asked": "float32"} and len(rows) == 4
    assert rows[3][1:3] == [f"{loaded['with_imports'][one]:.2f} s" for one in ("diffusers", "minidiff")]


def test_every_dependency_has_a_lower_bound_and_the_oldest_pytorch_is_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in needed if not re.search("[>=]=", one) and not one.startswith("minidiff[")] == []
    (torch,) = [one for one in needed if one.startswith("torch>=")]
    assert torch.replace(">=", " ") in README


def test_the_first_command_makes_its_picture(tmp_path):
    command = shlex.split(marked_commands()[0].split("&&")[-1])
    subprocess.run([sys.executable, "-m", "minidiff", *command[1:]], cwd=tmp_path, check=True, env=environment())
    sheet = command[command.index("--out") + 1]
    pictures = sorted(path.name for path in tmp_path.iterdir() if path.name != sheet)
    assert (tmp_path / sheet).exists() and pictures == [f"{Path(sheet).stem}-{seed}.png" for seed in range(9)]


def test_the_python_of_the_readme_runs(tmp_path):
    assert blocks(README, "python")
    for block in blocks(README, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True, env=environment())


@cache
def help_of(name: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        commands()[name].run(["--help-all"])
    return shown.getvalue()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_there_and_has_the_options_that_are_typed(name):
    known = commands()
    for words in typed_commands(DOCUMENTS[name]):
        if "-m" in words[:-1] and not words[words.index("-m") + 1].startswith(("venv", "pytest")):
            assert find_spec(words[words.index("-m") + 1]), words
        if Path(words[0]).name != "minidiff":
            continue
        command = " ".join(words[1:3]) if " ".join(words[1:3]) in known else words[1]
        assert command in known, words
        for option in [word for word in words if word.startswith("--") and word not in (*HELP, HELP_ALL)]:
            assert re.search(rf"{re.escape(option)}\b", help_of(command)), f"{shlex.join(words)}: {option}"


def test_the_readme_has_commands():
    assert len([words for words in typed_commands(README) if Path(words[0]).name == "minidiff"]) >= 6


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_linked_exists(name):
    linked = [path for path in re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)\"", DOCUMENTS[name]) if "://" not in "".join(path)]
    for path in map("".join, linked):
        assert ((ROOT / name).parent / path.split("#")[0]).exists(), path


def test_every_room_stands_in_the_reading_list():
    folder = ROOT / "minidiff"
    linked = {path.rstrip("/") for path in re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text())}
    assert all((folder / path).exists() for path in linked)
    rooms = {path.name for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - linked == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(("name", "count"), [("README.md", 10), ("minidiff/cli/README.md", 23)])
def test_the_messages_of_the_troubleshooting_table_are_the_codes_own(name, count):
    section = DOCUMENTS[name].split("## When something goes wrong")[1].split("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    sources = "".join(path.read_text() for folder in ("minidiff", "weights_loader") for path in (ROOT / folder).rglob("*.py"))
    said = re.sub(r"\"\s*f?\"", "", sources)  # literals that stand side by side are one
    assert len(rows) == count
    for message in [message for row in rows for message in re.findall("`([^`]+)`", row.split(" | ")[0])]:
        assert message in said, f"no code says: {message}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_fill_in(name):
    assert not re.search("TODO|_ROWS|TROUBLE\n|TRAIN_TIME", DOCUMENTS[name])
