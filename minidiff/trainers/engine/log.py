"""The log of a run: losses as numbers, as a curve, and to TensorBoard; how long it will take; how much memory it has taken.

folder/NAME.csv         step, loss, learning rate; a resumed run appends
folder/NAME-loss.png    the curve, drawn by Pillow
folder/tensorboard/     if the package tensorboard is installed
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from minidiff.files import write_text
from minidiff.markdown import format_duration
from minidiff.pictures import save_png
from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.loop import TrainStep

TEXT_EVERY = 1.0  # seconds between two looks at the loss: on a GPU each look waits for the step
FILES_EVERY = 30.0
WIDTH, HEIGHT, MARGIN = 720, 400, 48  # of the curve, in pixels
GREY, BLUE, INK = (200, 205, 215), (30, 90, 200), (60, 60, 60)


class Log:
    """Collect the steps of a run. Of several processes, the first one alone does."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        self.csv, self.png, self.device = folder / f"{name}.csv", folder / f"{name}-loss.png", device
        self.silent = distributed.rank() > 0
        self.rows: list[tuple[int, float, float]] = []  # step, loss, learning rate
        self.waiting: list[TrainStep] = []
        self.pace = Pace()
        self.looked = self.written = 0.0
        self.board = None if self.silent else tensorboard(folder / "tensorboard" / name)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._write()
        if self.board is not None:
            self.board.close()

    def add(self, step: TrainStep) -> None:
        """Take note of one more step."""
        if self.silent:
            return
        if not self.rows and not self.waiting:
            self.rows = [row for row in read_rows(self.csv) if row[0] < step.done]
        self.waiting.append(step)
        self.pace.add(step)
        now = time.monotonic()
        if now - self.looked > TEXT_EVERY:
            self._look()
            self.looked = now
        if now - self.written > FILES_EVERY:
            self._write()
            self.written = now

    def text(self) -> str:
        """Return "loss 0.1234, 1.2 GB, 12 min left"; the loss is the mean of the last ten steps looked at."""
        if not self.rows:
            return ""
        last = [loss for _, loss, _ in self.rows[-10:]]
        text = f"loss {sum(last) / len(last):.4f}, {memory_taken(self.device) / 1e9:.1f} GB"
        left = self.pace.left()
        return text if left is None else f"{text}, {format_duration(left)} left"

    def _look(self) -> None:
        for step in self.waiting:
            self.rows.append((step.done, float(step.loss), step.lr))
            if self.board is not None:
                self.board.add_scalar("loss", self.rows[-1][1], step.done)
                self.board.add_scalar("learning rate", step.lr, step.done)
        self.waiting = []

    def _write(self) -> None:
        self._look()
        if self.rows and not self.silent:
            write_text(self.csv, "".join(f"{i},{loss!r},{lr!r}\n" for i, loss, lr in self.rows))
            save_png(loss_curve([loss for _, loss, _ in self.rows], self.rows[0][0]), self.png)


class Pace:
    """The time that steps take. The first one is left out: it takes longer."""

    def __init__(self):
        self.first: tuple[int, float] | None = None  # number and end of the first step
        self.last = (0, 0.0)
        self.steps = 0

    def add(self, step: TrainStep) -> None:
        """Take note of a step that has just ended."""
        self.last, self.steps = (step.done, time.monotonic()), step.steps
        self.first = self.first or self.last

    def seconds(self) -> float | None:
        """Return the seconds per step, or None before the second one."""
        if self.first is None or self.last[0] == self.first[0]:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    def left(self) -> float | None:
        """Return the seconds until the last step, if all take as long as those before."""
        seconds = self.seconds()
        return None if seconds is None else seconds * (self.steps - self.last[0])

    def forecast(self) -> str | None:
        """Return a line to be printed once, after the first steps."""
        seconds, left = self.seconds(), self.left()
        return None if left is None else f"{self.steps - self.last[0]} steps of {seconds:.2g} s: about {format_duration(left)}"


def memory_taken(device: torch.device) -> int:
    """Return the most bytes so far: of the device's memory, or, on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def read_rows(path: Path) -> list[tuple[int, float, float]]:
    """Read what a Log wrote, up to the first line that is not whole; nothing if it is not there."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            i, loss, lr = line.split(",")
            rows.append((int(i), float(loss), float(lr)))
        except ValueError:
            break
    return rows


def tensorboard(folder: Path):
    """Return a writer of TensorBoard's files, or None if that package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def loss_curve(losses: Sequence[float], first: int = 1) -> Image.Image:
    """Draw each step's loss in grey, and their running mean over a fiftieth of the run in blue; `first` is the number of the first step."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    finite = np.asarray([loss for loss in losses if np.isfinite(loss)] or [0.0])
    low, high = finite.min(), max(np.quantile(finite, 0.99), finite.min() + 1e-8)  # a few wild steps should not flatten the rest
    window = max(1, len(losses) // 50)
    sums = np.cumsum([0.0, *np.nan_to_num(losses, nan=high, posinf=high)])
    ends = np.arange(1, len(losses) + 1)
    means = (sums[ends] - sums[np.maximum(0, ends - window)]) / np.minimum(ends, window)

    def place(i: int, loss: float) -> tuple[float, float]:
        across, up = i / max(1, len(losses) - 1), np.nan_to_num((loss - low) / (high - low), nan=1.0).clip(0, 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    for colour, values, width in ((GREY, losses, 1), (BLUE, means, 3)):
        pen.line([place(i, value) for i, value in enumerate(values)], fill=colour, width=width)
    pen.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill=INK)
    for value, anchor in ((high, "rm"), (low, "rm")):
        pen.text((MARGIN - 4, place(0, value)[1]), f"{value:.3g}", fill=INK, anchor=anchor)
    for number, i, anchor in ((first, 0, "la"), (first + len(losses) - 1, len(losses) - 1, "ra")):
        pen.text((place(i, low)[0], HEIGHT - MARGIN + 6), f"step {number}", fill=INK, anchor=anchor)
    pen.text((WIDTH / 2, MARGIN / 2), f"loss, last mean {means[-1]:.4f}", fill=INK, anchor="mm")
    return image
