"""Attach small files to a model: learned words, Custom Diffusion and LoRA; its own weights stay as they are.

    weights_loader.load("tiny", embeddings=("cat.safetensors",), lora=(("style.safetensors", 0.7),))

Words, then Custom Diffusion, whose weights take the place of the model's, then the LoRAs, which add to either (minidiff/adapters/base.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minidiff.adapters.base import Adapter
from minidiff.adapters.tokens import NewTokens
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.custom_diffusion import read_custom_diffusion
from weights_loader.adapters.embedding import read_embedding
from weights_loader.adapters.lora import read_lora
from weights_loader.adapters.origin import base_note
from weights_loader.read import read

File = str | Path


def attach(
    sd: StableDiffusion,
    *,
    lora: File | Sequence[File | tuple[File, float]] = (),
    embeddings: File | Sequence[File | tuple[File, str]] = (),
    custom_diffusion: File | Sequence[File | tuple[File, tuple[str, ...]]] = (),
) -> None:
    """Attach files to a model, all of them or none.

    sd.attached lists them, each with its file as title, and `detach()` takes one off again; sd.notes says the words that they add,
    and which files were learned on another model.

    Args:
        sd: the model
        lora: files, each alone or with its weight: ("style.safetensors", 0.7)
        embeddings: files, each alone or with its word in prompts: ("cat.pt", "<cat>")
        custom_diffusion: files, each alone or with the words of a file that does not name them: ("delta.ckpt", ("<new1>",))

    All files are read before any is attached. Raises as the readers do, and ValueError for a word that cannot be added.
    """
    read: list[tuple[str, File, Adapter]] = []
    read += [("embedding", path, read_embedding(path, sd, token)) for path, token in pairs(embeddings, None)]
    read += [("Custom Diffusion", path, read_custom_diffusion(path, sd, words)) for path, words in pairs(custom_diffusion, ())]
    for path, weight in pairs(lora, 1.0):
        read.append(("LoRA" if weight == 1 else f"LoRA at {weight:g}", path, read_lora(path, sd, float(weight))))
    for kind, path, adapter in read:
        try:
            adapter.requires_grad_(False)
            adapter.attach(sd)
        except ValueError as error:
            for _, _, done in reversed(read):  # those that are not attached stay as they are
                done.detach()
            way_out = "; embeddings=((FILE, WORD),) (--embedding FILE:WORD) gives it another word" * (kind == "embedding")
            raise ValueError(f"{path}: {error}{way_out}") from error
        adapter.title = f"{kind} {path}"
    words = [note for _, path, adapter in read if (note := words_note(path, adapter))]
    sd.notes += (*words, *(note for _, path, _ in read for note in base_notes(path, sd)))


def words_note(path: File, adapter: Adapter) -> str | None:
    """Return the words that a file adds, for its user to put into prompts; None if it adds none."""
    tokens = adapter if isinstance(adapter, NewTokens) else getattr(adapter, "tokens", None)
    if not isinstance(tokens, NewTokens):
        return None
    words = ", ".join(f"{name} ({len(rows)} vector{'s' * (len(rows) > 1)})" for name, rows in tokens.rows.items())
    return f"{path} adds the word{'s' * (len(tokens.rows) > 1)} {words}"


def base_notes(path: File, sd: StableDiffusion) -> list[str]:
    """Return what a user should know before a small file changes a model: that it was learned on another one, if it was."""
    note = base_note(path, metadata_of(path), sd)
    return [note] if note else []


def metadata_of(path: File) -> Mapping[str, str]:
    """Return the metadata of a small file, or of the safetensors files of a folder; nothing for pickles, which have none."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    return {key: text for file in files for key, text in read(file).metadata.items()}


def pairs(files: File | Sequence[Any], otherwise: Any) -> list[tuple[File, Any]]:
    """Return a file, or several, with or without a value each, as (file, value). Raises ValueError for anything else."""
    result = [file if isinstance(file, tuple) else (file, otherwise) for file in ([files] if isinstance(files, File) else files)]
    for pair in result:
        if len(pair) != 2 or not isinstance(pair[0], File):
            raise ValueError(f"{files!r}: expected a file, or a list of files and (file, value) pairs")
    return result
