"""What `minidiff inspect` says of a small file that changes or steers a model: a LoRA, learned words, a Custom Diffusion, a ControlNet."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from weights_loader import controlnet
from weights_loader.adapters import custom_diffusion, embedding, lora
from weights_loader.adapters.lora_file import Dialect, Factors
from weights_loader.detect import FEW, kind
from weights_loader.folder import INDEX
from weights_loader.read import Checkpoint, read


@dataclass(frozen=True)
class SmallSummary:
    """What a LoRA, an embedding or a Custom Diffusion is. Whether it fits a model is seen only when it is read. `str` makes a text of it.

    Args:
        path: the file.
        kind: in words.
        words: how many vectors each learned word has.
        width: numbers in a vector.
        parameters: numbers in the file.
        size: bytes of the file.
        dtypes: tensors of each dtype.
        metadata: as it is in the file.
        notes: what else is in the file.
        parts: how many layers change in each part of a model.
        ranks: how many layers have each rank.
        alphas: how many layers have each alpha.
    """

    path: Path
    kind: str
    words: Mapping[str, int]
    width: int | None
    parameters: int
    size: int
    dtypes: Mapping[str, int]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    parts: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    alphas: Mapping[float, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count}" for part, count in self.parts.items())
        words = ", ".join(f"{word} ({count} vector{'s' * (count > 1)})" for word, count in self.words.items())
        texts = {key: text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + " ..." for key, text in self.metadata.items()}
        lines = [
            str(self.path),
            f"  is          {self.kind}",
            *([f"  layers      {sum(self.parts.values())}: {parts}"] if self.parts else []),
            *([f"  rank        {_counted(self.ranks)}"] if self.ranks else []),
            *([f"  alpha       {_counted(self.alphas)}"] if self.alphas else []),
            *([f"  words       {words}, {self.width} wide"] if self.words else []),
            f"  parameters  {self.parameters / 1e6:.3f} M",
            f"  size        {self.size / 1e6:,.2f} MB",
            f"  dtype       {', '.join(f'{dtype} ({count} tensors)' for dtype, count in self.dtypes.items())}",
            *(f"  metadata    {key}: {text}" for key, text in texts.items()),
            *(f"  note        {note}" for note in self.notes),
        ]
        return "\n".join(lines)


SHOWN_TEXT = 300  # letters of a metadata value


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """List values with the number of layers that have each; many values as their range."""
    if len(values) > 4:
        return f"{min(values):g} to {max(values):g}"
    return ", ".join(f"{value:g}" if len(values) == 1 else f"{value:g} ({count} layers)" for value, count in values.items())


def inspect_small(given: Path) -> SmallSummary | None:
    """Summarise a file or folder that changes a model. Return None for anything else."""
    path = given
    if given.is_dir():
        folders = (*lora.FOLDER, *custom_diffusion.FOLDER, *controlnet.FOLDER)
        path = next((given / name for name in folders if (given / name).is_file()), None)
        if path is None or (given / INDEX).is_file():
            return None
    checkpoint = read(path)
    names = list(checkpoint.tensors)
    change = kind(names)
    try:
        if controlnet.is_controlnet(names):
            return summarise_controlnet(checkpoint)
        if dialect := lora.dialect_of(names):
            return summarise_lora(checkpoint, dialect)
        if change == "custom_diffusion":
            return summarise_custom_diffusion(checkpoint, given)
        if change == "embedding" or len(names) <= FEW and embedding.is_embedding(checkpoint.tensors):
            return _summary(checkpoint, "Textual Inversion embedding", embedding.parse(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return None


def summarise_lora(checkpoint: Checkpoint, dialect: Dialect) -> SmallSummary:
    """Summarise a LoRA in the given dialect."""
    changes = dialect.parse(checkpoint)
    parts = Counter(_part(name) for name in changes)
    factors = [one for one in changes.values() if isinstance(one, Factors)]
    ranks, alphas = Counter(one.rank for one in factors), Counter(one.alpha for one in factors)
    return replace(_summary(checkpoint, f"LoRA, names of {dialect.name}"), parts=parts, ranks=ranks, alphas=alphas)


def summarise_controlnet(checkpoint: Checkpoint) -> SmallSummary:
    """Summarise a ControlNet. Raises ValueError for its relatives, by name."""
    tensors, names = controlnet.parse(checkpoint)
    form = next((f", {what}" for key, what in controlnet.ADDED.items() if key in tensors), "")
    return replace(
        _summary(replace(checkpoint, tensors=tensors), f"ControlNet, names of {names}{form}"), parts={"U-Net and hint": len(tensors)}
    )


def _part(layer: str) -> str:
    second = re.search(r"^lora_te2_|^text_encoder_2\.", layer)
    return "text encoder 2" if second else "text encoder" if re.search(r"^lora_te_|encoder[._]layers", layer) else "unet"


def summarise_custom_diffusion(checkpoint: Checkpoint, given: Path) -> SmallSummary:
    """Summarise a Custom Diffusion: a file, or the folder `given` whose weights are the checkpoint."""
    changes, rows = custom_diffusion.parse(checkpoint.tensors)
    ranks = Counter(change[0].shape[1] for change in changes.values() if not isinstance(change, Tensor))
    what = "Custom Diffusion" + ", compressed" * bool(ranks)
    summary = _summary(checkpoint, what, rows | custom_diffusion.words_beside(given))
    return replace(summary, parts={"unet cross-attention": len(changes)}, ranks=ranks)


def _summary(checkpoint: Checkpoint, kind: str, rows: Mapping[str, Tensor] | None = None) -> SmallSummary:
    """Summarise what every small file has: the file itself, and the learned words {word: rows [n, D]}."""
    rows, tensors = rows or {}, list(checkpoint.tensors.values())
    return SmallSummary(
        path=checkpoint.path,
        kind=kind,
        words={word: len(vectors) for word, vectors in rows.items()},
        width=next((vectors.shape[1] for vectors in rows.values()), None),
        parameters=sum(tensor.numel() for tensor in tensors),
        size=checkpoint.path.stat().st_size,
        dtypes=count_dtypes(tensors),
        metadata=checkpoint.metadata,
        notes=checkpoint.notes,
    )


def count_dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Count the tensors of each dtype, the most frequent first."""
    return {str(dtype).removeprefix("torch."): count for dtype, count in Counter(tensor.dtype for tensor in tensors).most_common()}
