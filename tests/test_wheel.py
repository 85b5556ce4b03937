"""A wheel built from the tree is whole: installed by itself, it makes a picture in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.small_models import small_model
from weights_loader import save

ROOT = Path(__file__).parents[1]
PACKAGES = ("minidiff", "weights_loader")
DATA = (
    "minidiff/scenes/sheet.webp",
    "minidiff/scenes/bpe.txt",
    "minidiff/scenes/subjects.json",
    "minidiff/scenes/LICENSES.md",
    "weights_loader/bundled/tiny.safetensors",
    "weights_loader/bundled/README.md",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since building leaves folders behind."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", dist, tree, cwd=tree)
    (built,) = dist.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's packages, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel, cwd=target)
    return target


def test_it_has_every_file_of_the_packages_and_no_others(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.mark.parametrize("name", DATA)
def test_what_is_no_program_is_in_it(wheel, name):
    assert zipfile.ZipFile(wheel).getinfo(name).file_size == (ROOT / name).stat().st_size > 0


@pytest.mark.parametrize("model", ["tiny", "a file"])
def test_installed_in_an_empty_place_it_makes_a_picture(installed, tmp_path, model):
    folder = tmp_path / "empty"
    folder.mkdir()
    if model == "tiny":
        options = []  # what a newcomer types
    else:
        save(small_model(), tmp_path / "small.safetensors")
        options = ["--model", tmp_path / "small.safetensors"]
    where = run(
        "-c", "import minidiff, weights_loader; print(minidiff.__path__[0], weights_loader.__path__[0])", cwd=folder, path=installed
    )
    assert where.split() == [str(installed / name) for name in PACKAGES]
    run("-m", "minidiff", "generate", "a red apple", "--steps", "2", "--out", "apple.png", *options, cwd=folder, path=installed)
    assert [path.name for path in folder.iterdir()] == ["apple.png"]
    picture = Image.open(folder / "apple.png")
    assert len(picture.getcolors(maxcolors=10**6)) > 1  # not one flat colour


def run(*args: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Python with these arguments, without network and with nothing on its path but `path`; gives what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    process = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
