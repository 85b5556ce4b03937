"""What `minidiff inspect` says of a checkpoint, or of a small file that changes one."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from weights_loader import detect
from weights_loader.adapters import custom_diffusion, embedding, lora
from weights_loader.adapters.lora_file import Dialect, Factors
from weights_loader.contents import find
from weights_loader.detect import family_name
from weights_loader.load import load_with_report
from weights_loader.read import Checkpoint, read


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is, and what becomes of its tensors. `str` makes a text of it.

    parameters: numbers in each part that is computed with. dtypes: tensors of each dtype in the file. size: bytes of the file or folder.
    prediction: "eps" or "v". used, converted, carried: how many tensors. ignored: how many for each reason.
    """

    path: Path
    family: str
    layout: str
    parameters: dict[str, int]
    size: int
    dtypes: dict[str, int]
    prediction: str
    ema: bool
    used: int
    converted: dict[str, int]
    carried: int
    ignored: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:.2f} M" for name, count in self.parameters.items())
        lines = [
            str(self.path),
            f"  family      {self.family}",
            f"  predicts    {self.prediction}",
            f"  layout      {self.layout}",
            f"  parameters  {sum(self.parameters.values()) / 1e6:.2f} M: {parts}",
            f"  size        {self.size / 1e6:,.1f} MB",
            f"  dtype       {', '.join(f'{dtype} ({count} tensors)' for dtype, count in self.dtypes.items())}",
            f"  EMA         {'yes, beside the last weights (ema=True takes it)' if self.ema else 'no'}",
            f"  tensors     {self.used} used as they are",
            *(f"              {count} converted: {how}" for how, count in self.converted.items()),
            *([f"              {self.carried} carried along: not computed with, written back when saved"] if self.carried else []),
            *(f"              {count} ignored: {reason}" for reason, count in self.ignored.items()),
            *(f"  note        {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class SmallSummary:
    """What a LoRA, an embedding or a Custom Diffusion is; whether it fits a model is seen when it is read. `str` makes a text of it.

    parts: layers that change in each part of a model. words: vectors of each, width: their numbers. ranks, alphas: layers that have each.
    parameters: numbers in the file. size: its bytes. dtypes: tensors of each dtype. metadata: as it stands in the file.
    """

    path: Path
    kind: str
    parts: dict[str, int]
    words: dict[str, int]
    width: int | None
    ranks: dict[int, int]
    alphas: dict[float, int]
    parameters: int
    size: int
    dtypes: dict[str, int]
    metadata: dict[str, str]
    notes: tuple[str, ...]

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


def _counted(values: dict) -> str:
    if len(values) > 4:
        return f"{min(values):g} to {max(values):g}"
    return ", ".join(f"{value:g}" if len(values) == 1 else f"{value:g} ({count} layers)" for value, count in values.items())


def inspect(path: str | Path) -> Summary | SmallSummary:
    """Say what a checkpoint is, or what a LoRA, embedding or Custom Diffusion is.

    Of a checkpoint, weights stay in the file, unless it mixes dtypes; only where nothing says eps or v, the U-Net is run once.

    Raises as `load` does: what cannot be loaded is named by the error.
    """
    if small := _inspect_small(find(path)):
        return small
    loaded = load_with_report(path, dtype="file")
    sd, contents, report = loaded.sd, loaded.contents, loaded.report
    tensors = [tensor for part in (*contents.parts.values(), contents.rest) for tensor in part.values()]
    where = contents.path
    return Summary(
        path=where,
        family=family_name(sd.config),
        layout={"ldm": "ldm, a single file", "diffusers": "diffusers, a folder"}[contents.layout],
        parameters={name: sum(p.numel() for p in getattr(sd, name).parameters()) for name in contents.parts},
        size=sum(file.stat().st_size for file in where.rglob("*") if file.is_file()) if where.is_dir() else where.stat().st_size,
        dtypes=_dtypes(tensors),
        prediction=sd.config.schedule.prediction,
        ema=any(name.startswith("model_ema.diffusion_model") for name in contents.rest),
        used=len(report.used),
        converted=dict(Counter(report.converted.values())),
        carried=len(report.carried),
        ignored=report.reasons(),
        notes=sd.notes,
    )


def _inspect_small(given: Path) -> SmallSummary | None:
    """The summary of a file or folder that changes a model; None for anything else."""
    path = given
    if given.is_dir():
        path = next((given / name for name in (*lora.FOLDER, *custom_diffusion.FOLDER) if (given / name).is_file()), None)
        if path is None or (given / "model_index.json").is_file():
            return None
    checkpoint = read(path)
    names = list(checkpoint.tensors)
    kind = detect.kind(names)
    try:
        if dialect := lora.dialect_of(names):
            return _lora_summary(checkpoint, dialect)
        if kind == "custom_diffusion":
            changes, rows = custom_diffusion.parse_folder(given) if given.is_dir() else custom_diffusion.parse(checkpoint.tensors)
            ranks = Counter(change[0].shape[1] for change in changes.values() if not isinstance(change, Tensor))
            parts = {"unet cross-attention": len(changes)}
            return _small_summary(checkpoint, "Custom Diffusion" + ", compressed" * bool(ranks), rows=rows, parts=parts, ranks=ranks)
        if kind == "embedding" or len(names) <= detect.FEW and embedding.is_embedding(checkpoint.tensors):
            return _small_summary(checkpoint, "Textual Inversion embedding", rows=embedding.parse(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return None


def _lora_summary(checkpoint: Checkpoint, dialect: Dialect) -> SmallSummary:
    changes = dialect.parse(checkpoint)
    parts = Counter("text encoder" if re.search(r"^lora_te_|encoder[._]layers", name) else "unet" for name in changes)
    factors = [one for one in changes.values() if isinstance(one, Factors)]
    ranks, alphas = Counter(one.rank for one in factors), Counter(one.alpha for one in factors)
    return _small_summary(checkpoint, f"LoRA, names of {dialect.name}", parts=parts, ranks=ranks, alphas=alphas)


def _small_summary(
    checkpoint: Checkpoint, kind: str, rows: dict = {}, parts: dict = {}, ranks: dict = {}, alphas: dict = {}
) -> SmallSummary:
    tensors = list(checkpoint.tensors.values())
    return SmallSummary(
        path=checkpoint.path,
        kind=kind,
        parts=dict(parts),
        words={word: len(vectors) for word, vectors in rows.items()},
        width=next((vectors.shape[1] for vectors in rows.values()), None),
        ranks=dict(ranks),
        alphas=dict(alphas),
        parameters=sum(tensor.numel() for tensor in tensors),
        size=checkpoint.path.stat().st_size,
        dtypes=_dtypes(tensors),
        metadata=checkpoint.metadata,
        notes=checkpoint.notes,
    )


def _dtypes(tensors: list[Tensor]) -> dict[str, int]:
    return {str(dtype).removeprefix("torch."): count for dtype, count in Counter(tensor.dtype for tensor in tensors).most_common()}
