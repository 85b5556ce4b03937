"""What the files of LoRA and Custom Diffusion have in common: how one is found in a folder, and what is said of one that does not fit."""

from collections.abc import Sequence
from pathlib import Path

from weights_loader.report import SHOWN, nearest, some


def weights_file(path: str | Path, names: Sequence[str], kind: str) -> Path:
    """Return the file itself, or the first of these names that a folder has. kind: "LoRA", for the error.

    Raises ValueError for a folder without any.
    """
    path = Path(path)
    found = next((path / name for name in names if (path / name).is_file()), None)
    if path.is_dir() and found is None:
        what = f"a whole model, given as a {kind}" if (path / "model_index.json").is_file() else f"no {kind} in this folder"
        safe = [name for name in names if name.endswith(".safetensors")]
        raise ValueError(f"{path}: {what}; expected a file, or a folder with {' or '.join(safe)}")
    return found or path


def misfit(header: str, unknown: Sequence[str], known: Sequence[str], wrong: Sequence[str]) -> str:
    """Return the error of a file that does not fit a model.

    Args:
        header: the first line
        unknown: names of layers that the model lacks
        known: names to look for the nearest ones
        wrong: lines on layers of another shape
    """
    absent = [f"no layer {name}{nearest(name, list(known))}" for name in unknown[:SHOWN]]
    return "\n".join([header, *some(absent, len(unknown)), *some(list(wrong), len(wrong))])
