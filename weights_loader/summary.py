"""What `minidiff inspect` says of a checkpoint."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from weights_loader.detect import family_name
from weights_loader.load import load_with_report


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


def inspect(path: str | Path) -> Summary:
    """Say what a checkpoint is. Weights stay in the file, unless it mixes dtypes; only where nothing says eps or v, the U-Net is run once.

    Raises as `load` does: what cannot be loaded is named by the error.
    """
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
        dtypes={str(dtype).removeprefix("torch."): count for dtype, count in Counter(tensor.dtype for tensor in tensors).most_common()},
        prediction=sd.config.schedule.prediction,
        ema=any(name.startswith("model_ema.diffusion_model") for name in contents.rest),
        used=len(report.used),
        converted=dict(Counter(report.converted.values())),
        carried=len(report.carried),
        ignored=report.reasons(),
        notes=sd.notes,
    )
