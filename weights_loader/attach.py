"""Small files onto a model: learned words, Custom Diffusion and LoRA, attached by hooks beside its weights.

    weights_loader.load("tiny", embeddings=("cat.safetensors",), lora=(("style.safetensors", 0.7),))

The words come first, then Custom Diffusion, whose weights stand in the place of the model's, then the LoRAs, which add to either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minidiff.pipeline import StableDiffusion
from weights_loader.custom_diffusion import read_custom_diffusion
from weights_loader.embedding import read_embedding
from weights_loader.lora import read_lora

File = str | Path


@dataclass(frozen=True)
class Attached:
    """A file that is attached to a model: StableDiffusion.adapters is a list of them. `adapter.detach()` takes it off again."""

    path: Path
    kind: str
    adapter: nn.Module

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


def attach(
    sd: StableDiffusion,
    *,
    lora: File | Sequence[File | tuple[File, float]] = (),
    embeddings: File | Sequence[File | tuple[File, str]] = (),
    custom_diffusion: File | Sequence[File | tuple[File, tuple[str, ...]]] = (),
):
    """Attach files to a model: each by its name, or with a value.

    The value of a LoRA is its weight, that of an embedding the word it shall have in prompts, that of a Custom Diffusion the words of a
    file that does not name them.
    All files are read before any is attached. Raises as the readers do, and ValueError for a word that cannot be added.
    """
    read = []
    for path, token in pairs(embeddings, None):
        read.append(Attached(Path(path), "embedding", read_embedding(path, sd, token)))
    for path, words in pairs(custom_diffusion, ()):
        read.append(Attached(Path(path), "Custom Diffusion", read_custom_diffusion(path, sd, words)))
    for path, weight in pairs(lora, 1.0):
        one = read_lora(path, sd)
        one.weight = float(weight)
        read.append(Attached(Path(path), "LoRA" if weight == 1 else f"LoRA at {weight:g}", one))
    for i, one in enumerate(read):
        try:
            one.adapter.requires_grad_(False)
            one.adapter.attach(sd)
        except ValueError as error:
            for done in reversed(read[:i]):
                done.adapter.detach()
            raise ValueError(f"{one.path}: {error}") from error
    sd.adapters.extend(read)


def pairs(files: object, otherwise: object) -> list[tuple]:
    """A file, or several, with or without a value each, as (file, value). Raises ValueError for anything else."""
    result = [file if isinstance(file, tuple) else (file, otherwise) for file in ([files] if isinstance(files, File) else files)]
    for pair in result:
        if len(pair) != 2 or not isinstance(pair[0], File):
            raise ValueError(f"{files!r}: expected a file, or a list of files and (file, value) pairs")
    return result
