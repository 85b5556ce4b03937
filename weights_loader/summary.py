"""What `minidiff inspect` says of a checkpoint; of a small file that changes one, adapters/summary.py says it."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from weights_loader.adapters.summary import SmallSummary, count_dtypes, inspect_small
from weights_loader.contents import find
from weights_loader.families import family_of_config
from weights_loader.load import LoadOptions, load_with_report
from weights_loader.name_table import EMA_PREFIX
from weights_loader.read import verify as verify_numbers


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is, and what becomes of its tensors. `str` makes a text of it.

    Args:
        path: the file or folder.
        family: in words.
        layout: in words.
        parameters: numbers in each part that is computed with.
        size: bytes of the file or folder.
        dtypes: tensors of each dtype in the file.
        prediction: "eps" or "v".
        decided: what says so.
        ema: whether moving averages of the U-Net's weights are in it.
        used: how many tensors are used as they are.
        converted: how many are converted, in each way.
        extra: how many are kept, though nothing is computed with them.
        ignored: how many, for each reason.
        notes: what else is worth saying.
    """

    path: Path
    family: str
    layout: str
    parameters: dict[str, int]
    size: int
    dtypes: dict[str, int]
    prediction: str
    decided: str
    ema: bool
    used: int
    converted: dict[str, int]
    extra: int
    ignored: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:.2f} M" for name, count in self.parameters.items())
        lines = [
            str(self.path),
            f"  family      {self.family}",
            f"  predicts    {self.prediction}, by {self.decided}",
            f"  layout      {self.layout}",
            f"  parameters  {sum(self.parameters.values()) / 1e6:.2f} M: {parts}",
            f"  size        {self.size / 1e6:,.1f} MB",
            f"  dtype       {', '.join(f'{dtype} ({count} tensors)' for dtype, count in self.dtypes.items())}",
            f"  EMA         {'yes, beside the last weights (ema=True takes it)' if self.ema else 'no'}",
            f"  tensors     {self.used} used as they are",
            *(f"              {count} converted: {how}" for how, count in self.converted.items()),
            *([f"              {self.extra} carried along: not computed with, written back when saved"] if self.extra else []),
            *(f"              {count} ignored: {reason}" for reason, count in self.ignored.items()),
            *(f"  note        {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def inspect(path: str | Path, *, ignore: str | None = None, verify: bool = False) -> Summary | SmallSummary:
    """Say what a checkpoint is, or what a LoRA, embedding or Custom Diffusion is.

    ignore: as in `load`.
    verify: compare all numbers with the checksums in the file, as far as its format has some; a note says what they show.

    Of a checkpoint, weights stay in the file, unless it mixes dtypes; only where nothing says eps or v, the U-Net is run once.

    Raises as `load` does: what cannot be loaded is named by the error.
    """
    checked = verify_numbers(find(path)) if verify else ()
    if small := inspect_small(find(path)):
        return replace(small, notes=(*small.notes, *checked))
    loaded = load_with_report(path, LoadOptions(dtype="file", ignore=ignore))
    sd, contents, report = loaded.sd, loaded.contents, loaded.report
    where = contents.path
    return Summary(
        path=where,
        family=family_of_config(sd.config).name_of(sd.config),
        layout={"ldm": "ldm, a single file", "diffusers": "diffusers, a folder"}[contents.layout],
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in sd.parts.items()},
        size=sum(file.stat().st_size for file in where.rglob("*") if file.is_file()) if where.is_dir() else where.stat().st_size,
        dtypes=count_dtypes(contents.tensors.values()),
        prediction=sd.config.schedule.prediction,
        decided=loaded.decided,
        ema=any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in contents.rest),
        used=len(report.used),
        converted=dict(Counter(report.converted.values())),
        extra=len(report.extra),
        ignored=report.reasons(),
        notes=(*(note for note in sd.notes if not note.startswith("predicts ")), *checked),
    )
