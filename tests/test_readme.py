"""What the README says is done here, as it says it."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def marked_commands() -> list[str]:
    return re.findall(r"^<!-- run -->\n```bash\n(.*?)\n```", README, flags=re.MULTILINE | re.DOTALL)


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


def test_the_python_of_the_readme_runs(tmp_path):
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True, env=environment())


def test_every_minidiff_command_of_the_readme_parses():
    commands = [line for block in blocks("bash") for line in re.split("\n|&&", block) if "minidiff " in line and "pip" not in line]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)[1:]
        options = [word for word in words if word.startswith("--")]
        name = words[:2] if words[0] in ("train", "bench", "merge", "evaluate", "hint") else words[:1]
        shown = subprocess.run(
            [sys.executable, "-m", "minidiff", *name, "--help-all"], capture_output=True, text=True, check=True, env=environment()
        ).stdout
        for option in options:
            assert option in shown, f"{command}: {option}"


def test_every_file_the_readme_names_exists():
    linked = [path for path in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in path]
    assert linked
    for path in linked:
        assert (ROOT / path).exists(), path


def test_every_room_stands_in_the_reading_list():
    folder = ROOT / "minidiff"
    linked = {path.rstrip("/") for path in re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text())}
    assert all((folder / path).exists() for path in linked)
    rooms = {path.name for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - linked == {"__init__.py", "__main__.py"}


def test_the_messages_of_the_troubleshooting_table_are_the_codes_own():
    section = README.split("## When something goes wrong")[1].split("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    sources = "".join(path.read_text() for folder in ("minidiff", "weights_loader") for path in (ROOT / folder).rglob("*.py"))
    said = re.sub(r"\"\s*f?\"", "", sources)  # literals that stand side by side are one
    assert len(rows) >= 6
    for row in rows:
        message = row.split("`")[1]
        assert message in said, f"no code says: {message}"


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("word", ["TODO", "PARITY_ROWS", "LOAD_ROWS", "TROUBLE\n", "TRAIN_TIME"])
def test_nothing_is_left_to_fill_in(word):
    assert word not in README
