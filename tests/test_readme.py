"""The READMEs: their commands, their Python, their links and the messages that they explain are those of the project."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from minidiff.cli.main import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (".github", "lessons", "minidiff", "tests", "weights_loader")
PATHS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *(path for one in FOLDERS for path in (ROOT / one).rglob("README.md"))]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
WITH_PYTHON = ["README.md", "weights_loader/README.md"]  # editing/README.md has a test of its own


def blocks(text: str, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def marked_commands() -> list[str]:
    return re.findall(r"^<!-- run -->\n```bash\n(.*?)\n```", README, flags=re.MULTILINE | re.DOTALL)


def typed_commands(text: str) -> list[list[str]]:
    """The words of every command line in the blocks of a document; the parts of `a && b` apart, and without comments."""
    lines = [line for block in blocks(text, "bash|sh") for line in block.splitlines()]
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_two_commands_do_everything_on_a_fresh_machine():
    picture, tests = marked_commands()
    assert picture.startswith("python3 -m venv") and "pip install" in picture and "minidiff generate" in picture
    assert tests.startswith("python3 -m venv") and "pip install" in tests and "pytest" in tests
    assert "\n" not in picture + tests  # each is one line, to be pasted


def test_every_dependency_has_a_lower_bound_and_the_oldest_pytorch_is_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in needed if not re.search("[>=]=", one) and not one.startswith("minidiff[")] == []
    (torch,) = [one for one in needed if one.startswith("torch>=")]
    assert torch.replace(">=", " ") in README


def test_the_first_command_makes_its_picture(tmp_path):
    command = shlex.split(marked_commands()[0].split("&&")[-1])
    subprocess.run([sys.executable, "-m", "minidiff", *command[1:]], cwd=tmp_path, check=True, env=environment())
    assert [p.name for p in tmp_path.iterdir()] == [command[command.index("--out") + 1]]


@pytest.mark.parametrize("name", WITH_PYTHON[:1])
def test_its_python_runs(name, tmp_path):
    for block in blocks(DOCUMENTS[name], "python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True, env=environment())


@cache
def help_of(name: str) -> str:
    import contextlib
    import io

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
        for option in [word for word in words if word.startswith("--")]:
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


@pytest.mark.parametrize("name", ["README.md"])
def test_the_messages_of_the_troubleshooting_table_are_the_codes_own(name):
    section = DOCUMENTS[name].split("## When something goes wrong")[1].split("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    sources = "".join(path.read_text() for folder in ("minidiff", "weights_loader") for path in (ROOT / folder).rglob("*.py"))
    said = re.sub(r"\"\s*f?\"", "", sources)  # literals that stand side by side are one
    assert len(rows) >= 6
    for row in rows:
        message = row.split("`")[1]
        assert message in said, f"no code says: {message}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_fill_in(name):
    assert not re.search("TODO|_ROWS|TROUBLE\n|TRAIN_TIME", DOCUMENTS[name])
