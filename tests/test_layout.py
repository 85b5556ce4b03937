"""The order of the rooms: what may import what, how large the core is, and that it stands without the rest."""

import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import minidiff

ROOT = Path(minidiff.__file__).parent
CORE = (
    "config",
    "tokenizer",
    "attention",
    "blocks",
    "text_encoder",
    "unet",
    "vae",
    "schedule",
    "samplers",
    "guidance",
    "conditioning",
    "two_encoders",
    "pipeline",
)
# Each line may import the lines above it and itself.
ORDER = (
    ("files", "markdown", "machine", "pictures", "captions", "png_settings"),
    ("kernels",),
    (*CORE, "tiled_decode", "cuda_graph", "transfer"),
    ("attention_maps", "heat_maps", "compare", "controlnet", "hints", "offload"),
    ("adapters", "editing"),
    ("scenes",),
    ("trainers",),
    ("evaluation",),
    ("bundled",),
    ("weights_loader",),  # of the rooms above it takes the core, the adapters and the judge
    ("study", "bench"),
    ("cli", "__main__"),
)
KNOW_WEIGHTS_LOADER = ("bench", "cli")


def imports(path: Path) -> set[str]:
    """The rooms of the project that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) and node.module for alias in node.names]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    ours = [module.split(".") for module in modules if module.split(".")[0] in ("minidiff", "weights_loader")]
    ours = [parts for parts in ours if parts not in (["minidiff"], ["minidiff", "__version__"])]
    return {parts[0] if parts[0] == "weights_loader" else parts[1] for parts in ours}


def test_every_import_goes_up_the_list_and_only_two_rooms_know_weights_loader():
    rank = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    wrong = []
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "weights_loader").rglob("*.py")]:
        room = "weights_loader" if "weights_loader" in path.parts[-3:] else path.relative_to(ROOT).parts[0].removesuffix(".py")
        if path == ROOT / "__init__.py":
            continue  # public names, imported late
        wrong += [f"{path}: {other}" for other in imports(path) if rank[other] > rank[room]]
        wrong += [
            f"{path}: weights_loader" for other in imports(path) if other == "weights_loader" and room not in (*KNOW_WEIGHTS_LOADER, other)
        ]
    assert not wrong, "\n".join(wrong)


def test_the_core_is_short_enough_to_be_read():
    assert sum(len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE) < 2300


def test_the_public_names_are_there_and_come_late():
    for name in minidiff.__all__:
        assert getattr(minidiff, name) is getattr(import_module(getattr(minidiff, name).__module__), name)
    assert minidiff.__version__


@pytest.mark.slow
def test_the_core_stands_without_the_rest(tmp_path):
    """All rooms but the core, the kernels and the three ways to save time and memory are deleted, and the core's own tests pass."""
    kept = {"__init__", *ORDER[1], *ORDER[2]}
    shutil.copytree(
        ROOT, tmp_path / "minidiff", ignore=lambda folder, names: [n for n in names if Path(folder) == ROOT and Path(n).stem not in kept]
    )
    tests = tmp_path / "tests"
    shutil.copytree(ROOT.parent / "tests", tests, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    shutil.copy(ROOT.parent / "pyproject.toml", tmp_path)
    files = [f"tests/test_{name}.py" for name in CORE]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], cwd=tmp_path, check=True, env=environment
    )
