"""Runs a lesson as a notebook, once for each state of its code and of the bundled models.

    NN_name.py --jupytext--> notebook --nbclient--> notebook with its output, kept in a folder with a stamp of what it was made from

A notebook whose stamp still holds is not run again: a build that was interrupted goes on where it was, and a change of the text alone costs nothing.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from lessons.catalogue import HERE, Entry

SECONDS = 3600  # a cell may take, on a busy machine
MODELS = HERE.parent / "weights_loader" / "bundled"


@dataclass(frozen=True)
class Stamp:
    """What a run was made from: hashes of a lesson's code cells and of the bundled models, and the lesson's options."""

    code: str
    models: str
    options: str = ""


def stamp(entry: Entry, options: str = "") -> Stamp:
    """Return the stamp of a lesson as it stands."""
    return Stamp(code_hash(source(entry)), models_hash(), options)


def code_hash(notebook: NotebookNode) -> str:
    """Return a short hash of the notebook's code cells."""
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(codes).encode()).hexdigest()[:12]


@cache
def models_hash() -> str:
    """Return a short hash of the models that ship with minidiff."""
    found = hashlib.sha256()
    for path in sorted(MODELS.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def source(entry: Entry) -> NotebookNode:
    """Return the lesson as a notebook without output, its cells numbered."""
    notebook = jupytext.read(entry.path, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def execute(
    chosen: Sequence[Entry], folder: Path, options: str = "", *, again: bool = False, jobs: int = 1
) -> Iterator[tuple[Entry, float | None]]:
    """Run the lessons into folder/NN_name.ipynb and folder/figures; yield each with the seconds it took, None where its notebook still held.

    Args:
        chosen: the lessons; those that need no run come first
        folder: where notebooks and figures are kept
        options: as on a lesson's command line
        again: run even what still holds
        jobs: lessons that run side by side

    Raises nbclient's CellExecutionError for a lesson that fails; those that were finished are kept.
    """
    stale = [entry for entry in chosen if again or not holds(entry, folder, options)]
    yield from ((entry, None) for entry in chosen if entry not in stale)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        running = {pool.submit(_run, entry, folder, options): entry for entry in stale}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def holds(entry: Entry, folder: Path, options: str = "") -> bool:
    """Return whether the lesson's notebook in the folder was made from its present code, models and options."""
    path = folder / f"{entry.name}.ipynb"
    return path.is_file() and nbformat.read(path, as_version=4).metadata.get("minidiff") == vars(stamp(entry, options))


def executed(entry: Entry, folder: Path) -> NotebookNode:
    """Return the lesson's present text and code with the outputs of its notebook in the folder."""
    notebook = source(entry)
    kept = nbformat.read(folder / f"{entry.name}.ipynb", as_version=4)
    outputs = iter([cell for cell in kept.cells if cell.cell_type == "code"])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            other = next(outputs)
            cell.outputs, cell.execution_count = other.outputs, other.execution_count
    return notebook


def _run(entry: Entry, folder: Path, options: str) -> float:
    begin, notebook = time.monotonic(), source(entry)
    notebook.metadata["minidiff"] = vars(stamp(entry, options))
    environment = os.environ | {
        "LESSON_OPTIONS": f"{options} --figures '{(folder / 'figures').resolve()}'",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    quiet = ["--log-level=ERROR"]  # a warning that whoever shares the machine could listen
    at = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=SECONDS, resources=at, extra_arguments=quiet, coalesce_streams=True).execute(env=environment)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{entry.name}.ipynb.part"
    nbformat.write(notebook, unfinished)
    unfinished.replace(folder / f"{entry.name}.ipynb")
    return time.monotonic() - begin
