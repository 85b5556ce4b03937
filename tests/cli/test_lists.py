"""`minidiff list KIND`, and completion from the same tables."""

import re
import shutil
import subprocess

import pytest

from minidiff.cli.completion import script
from minidiff.cli.lists import LISTS
from minidiff.cli.main import commands
from minidiff.cli.public_checkpoints import PUBLIC_CHECKPOINTS
from minidiff.samplers import SAMPLERS
from minidiff.scenes.art import STYLES, subject_names
from minidiff.trainers.methods.table import METHODS
from tests.command import runner
from weights_loader.adapters.lora import DIALECTS
from weights_loader.families import FAMILIES

EXPECTED = {
    "samplers": tuple(SAMPLERS),
    "subjects": subject_names(held_out=False) + subject_names(held_out=True),
    "styles": STYLES,
    "methods": tuple(METHODS),
    "families": tuple(family.name for family in FAMILIES),
    "dialects": tuple(dialect.name for dialect in DIALECTS),
    "checkpoints": tuple(one.repository for one in PUBLIC_CHECKPOINTS),
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_names_everything_of_its_kind(run, kind):
    code, out, err = run("list", kind)
    assert (code, err) == (0, "") and all(name in out for name in EXPECTED[kind])
    assert "Traceback" not in out and all(line == line.rstrip() for line in out.splitlines())


def test_samplers_take_half_a_line_each(run):
    lines = run("list", "samplers")[1].splitlines()
    assert len(lines) == len(SAMPLERS) and max(map(len, lines)) <= 90


def test_an_unknown_kind_is_told_which_there_are(run):
    for args in (("list", "sampler"), ("list", "colors")):
        code, out, err = run(*args)
        assert (code, out) == (2, "") and f"{args[1]!r} unknown; choose samplers, subjects" in err
    assert run("list")[0] == 2


def test_checkpoints_say_size_licence_and_date_and_mark_mirrors():
    for one in PUBLIC_CHECKPOINTS:
        assert re.fullmatch(r"\d+\.\d\d GB", one.size) and re.fullmatch(r"20\d\d-\d\d", one.date) and one.licence
        assert one.file.endswith((".safetensors", ".ckpt", ".pth")) and one.repository.count("/") == 1
    for gone in ("runwayml/", "stabilityai/stable-diffusion-2"):
        assert not any(one.repository.startswith(gone) for one in PUBLIC_CHECKPOINTS)
        assert any(one.mirror_of.startswith(gone) for one in PUBLIC_CHECKPOINTS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_kinds_and_flags(run, tmp_path):
    (tmp_path / "completion.sh").write_text(run("completion")[1])

    def completed(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in words)
        line = f"source completion.sh; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _minidiff; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert completed("minidiff", "gen") == ["generate"]
    assert set(completed("minidiff", "")) == {name.split()[0] for name in commands()}
    assert completed("minidiff", "train", "lo") == ["lora"]
    assert completed("minidiff", "train", "lora", "--images", "cats", "--lear") == ["--learning-rate"]
    assert completed("minidiff", "generate", "a fox", "--guid") == ["--guidance-scale"]
    assert completed("minidiff", "list", "sa") == ["samplers"]
    assert completed("minidiff", "nothing", "x") == []


def test_the_script_tries_longer_names_first():
    text = script({"train": ["lora"], "train lora": ["--images"]})
    assert text.index('"train lora "') < text.index('"train "')
