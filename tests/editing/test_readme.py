"""What editing/README.md says: its files are all files, its Python runs, its commands are there, its tables are those of the measurement."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import minidiff.editing
from minidiff.bundled import attention_edits, edits
from minidiff.bundled.edits import renew_tables

PARTS = (*edits.PARTS, *attention_edits.PARTS)
FOLDER = Path(minidiff.editing.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_file_is_listed():
    assert set(re.findall(r"\]\((\w+\.py)\)", README)) == {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}


def test_its_python_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code, environment = block + "assert len(dogs) == 2", {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)


def test_its_commands_have_the_options_that_they_name():
    commands = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]
    shown = {
        name: subprocess.run(
            [sys.executable, "-m", "minidiff", *name.split(), "--help-all"], capture_output=True, text=True, check=True
        ).stdout
        for name in ("generate", "edit", "evaluate edits")
    }
    assert len(commands) >= 8
    for words in commands:
        name = words[1] if words[1] in shown else "evaluate edits"
        assert all(word in shown[name] for word in words if word.startswith("--")), words
    assert {words[words.index("--part") + 1] for words in commands if "--part" in words} == set(PARTS)


def test_its_tables_have_been_measured_and_can_be_renewed():
    for part in PARTS:
        table = README.split(f"<!-- {part} -->\n")[1].split(f"<!-- end of {part} -->")[0]
        assert len(table.splitlines()) > 3, f"make it: minidiff evaluate edits --part {part} --readme minidiff/editing/README.md"
        assert renew_tables(README, {part: table.rstrip("\n")}) == README
