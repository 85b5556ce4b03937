"""What every lesson calls: its options, a model, pictures and curves in one style, and the check of what the learner writes.

    lesson = start("01_adding_noise")                  # python lessons/01_adding_noise.py [--model FILE] [--device cuda] [--quick]
    sd = lesson.load()
    lesson.show(fig, "ladder", "what is to be seen")   # lessons/figures/01-ladder.png; a notebook shows it too
    q_sample = lesson.check(q_sample)                  # says what is wrong, and continues with the library's own function

In a notebook and in an editor's cells there is no command line: there, write the options into the call, start("01_adding_noise", "--quick").
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures are files; a notebook shows the file

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import weights_loader
from lessons.exercises import complaint, exercises
from minidiff.cli.model import choose_device
from minidiff.guidance import guided
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import Scene

HERE = Path(__file__).parent
LARGEST = 80_000  # bytes of a picture

# Okabe and Ito's colours, which stay apart for colour-blind eyes; their yellow is too pale on white.
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"

# 720 pixels wide; at half the size, on a phone, the letters are still 10 pixels high.
STYLE = {
    "figure.figsize": (6.0, 3.6),
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 14,
    "axes.titlesize": 14,
    "axes.labelsize": 14,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, RED, SKY]),
    "lines.linewidth": 2.2,
    "image.cmap": "cividis",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}
plt.rcParams.update(STYLE)


@dataclass(frozen=True)
class Lesson:
    """One run of a lesson. quick: do less of everything, for tests. figures: the folder its pictures go to."""

    name: str
    model: str
    device: torch.device
    quick: bool
    figures: Path

    def load(self) -> StableDiffusion:
        """The model, in float32 on every device, so that a lesson need not think of types."""
        sd = weights_loader.load(self.model, dtype=torch.float32, device=self.device)
        for note in sd.notes:
            print(note)
        return sd

    def show(self, fig: Figure, name: str, alt: str) -> None:
        """Writes the figure as NN-name.png and, in a notebook, shows it. alt: what is to be seen, for who cannot see it.

        Raises ValueError for a picture of more than 80 kB.
        """
        data = png(fig)
        plt.close(fig)
        if len(data) > LARGEST:
            raise ValueError(f"picture {name!r} has {len(data):,} bytes, at most {LARGEST:,} are wanted; draw fewer or smaller pictures")
        self.figures.mkdir(parents=True, exist_ok=True)
        path = self.figures / f"{self.name[:2]}-{name}.png"
        path.write_bytes(data)
        if in_notebook():
            from IPython.display import Image as Shown
            from IPython.display import display

            display(Shown(data=data, alt=alt, metadata={"name": path.name}))
        else:
            print(f"[picture: {path}]")

    def check(self, written: Callable, instead: Callable | None = None) -> Callable:
        """Return the learner's function if it is right, and otherwise the library's; print which, and why.

        written: the learner's. instead: the library's, where the exercise does not name it. A function that is right is put to use at once:
        its exercise's number is printed, its picture shown.
        """
        wrong, exercise = complaint(self.name, written), exercises(self.name)[written.__name__]
        print(f"{written.__name__}: {'right' if wrong is None else wrong}")
        if wrong is not None:
            print("The lesson goes on with the library's own." if instead or exercise.library else "The lesson goes on with the answer.")
            return instead or exercise.library or exercise.answer
        if exercise.number:
            print(exercise.number(written))
        if exercise.picture:
            figures = HERE.parent / "runs" / "lessons"  # not among those that are kept
            replace(self, figures=figures).show(
                exercise.picture(written), f"yours-{written.__name__}", f"Drawn by your {written.__name__}."
            )
        return written


def start(name: str, options: str = "") -> Lesson:
    """The run of the lesson `name`, as the command line says; in a notebook `options` say it, or the variable LESSON_OPTIONS."""
    parser = argparse.ArgumentParser(prog=f"python lessons/{name}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the bundled model, a .safetensors or .ckpt file, or a diffusers folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it runs")
    parser.add_argument(
        "--figures", type=Path, help="folder for the pictures; lessons/figures, or runs/lessons with another model or --quick"
    )
    is_program = Path(sys.argv[0]).stem == name
    args = parser.parse_args(sys.argv[1:] if is_program else shlex.split(options or os.environ.get("LESSON_OPTIONS", "")))
    usual = args.model == "tiny" and not args.quick
    figures = args.figures or (HERE / "figures" if usual else HERE.parent / "runs" / "lessons")
    try:
        return Lesson(name, args.model, choose_device(args.device), args.quick, figures)
    except ValueError as error:
        parser.error(str(error))


def x0_predictor(sd: StableDiffusion, prompts: Sequence[str]) -> Callable[[Tensor, int], Tensor]:
    """Return look(x_t, t), the model's prediction of the clean latents of x_t [B, C, H, W] at the timestep t, one number.

    The prompts guide it at the model's usual scale, whether the model predicts eps or v.
    """
    cond, uncond = sd.encode_prompts(list(prompts)), sd.encode_prompts([""] * len(prompts))
    model = guided(sd.unet, cond, uncond, sd.config.guidance_scale)
    convert = x0_converter(sd)

    @torch.no_grad()
    def look(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        return convert(x_t, timesteps, model(x_t, timesteps))

    return look


def x0_converter(sd: StableDiffusion) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return convert(x_t, t, out), which turns the U-Net's output, eps or v, into its prediction of the clean latents."""
    return sd.schedule.x0_from_v if sd.schedule.config.prediction == "v" else sd.schedule.x0_from_eps


def scene_pixels(sd: StableDiffusion, scenes: Sequence[Scene]) -> Tensor:
    """Return the scenes' pictures [B, 3, H, W] with values in [-1, 1], scaled to the model's own size."""
    pictures = to_pixels(np.stack([scene.image for scene in scenes]))
    return F.interpolate(pictures, size=(sd.config.image_size,) * 2, mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def scene_latents(sd: StableDiffusion, scenes: Sequence[Scene]) -> Tensor:
    """Return the scaled latents [B, C, H, W] of the scenes' pictures, on the model's device."""
    return sd.vae.encode(scene_pixels(sd, scenes).to(sd.device)).mean * sd.config.vae.scaling_factor


def milliseconds(function: Callable, *arguments: Tensor | int) -> float:
    """Return how long a call takes, the fastest of four; work on a GPU is waited for."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean squared difference; it is 1.4 for two tensors of unit normal noise."""
    return float((a - b).square().mean().sqrt())


def curves(
    lines: Mapping[str, tuple[Sequence, Sequence]],
    xlabel: str,
    ylabel: str,
    *,
    log: str = "",
    dashed: Sequence[str] = (),
    xticks: Sequence = (),
    xlim: tuple | None = None,
    ylim: tuple | None = None,
) -> Figure:
    """Return one figure of several curves, with a legend.

    Args:
        lines: the points of each curve, x and y, by its name
        xlabel: of the horizontal axis
        ylabel: of the vertical axis
        log: the axes that are logarithmic, "x", "y" or "xy"
        dashed: names of curves that are drawn thin, black and without points: laws and limits
        xticks: where the horizontal axis is labelled; matplotlib chooses if there are none
        xlim: ends of the horizontal axis
        ylim: ends of the vertical axis
    """
    fig, axis = plt.subplots()
    markers = iter("os^Dv")
    for name, (x, y) in lines.items():
        style = (
            {"color": "black", "linestyle": "--", "linewidth": 1} if name in dashed else {"marker": next(markers) if len(x) < 50 else None}
        )
        axis.plot(np.asarray(x), np.asarray(y), label=name, **style)
    axis.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear", xlabel=xlabel, ylabel=ylabel)
    if len(xticks):
        axis.set_xticks(xticks, [str(tick) for tick in xticks])
        axis.minorticks_off()
    axis.set(xlim=xlim, ylim=ylim)
    if len(lines) > 1:
        axis.legend()
    return fig


def picture_grid(rows: Sequence[Sequence], columns: Sequence[str] = (), labels: Sequence[str] = ()) -> Figure:
    """Pictures in rows: PIL images, or two-dimensional arrays drawn as maps. columns: words above them; labels: beside the rows.

    A None leaves its place empty.
    """
    width = STYLE["figure.figsize"][0]
    wide, high = max(len(row) for row in rows), len(rows)
    side = (width - (1.2 if labels else 0)) / wide
    fig, axes = plt.subplots(high, wide, squeeze=False, figsize=(width, high * side + (0.4 if columns else 0.05)))
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.axis("off")
    for i, row in enumerate(rows):
        for axis, picture in zip(axes[i], row):
            if picture is not None:
                axis.imshow(np.asarray(picture))
    for axis, text in zip(axes[0], columns):
        axis.set_title(text, fontsize=min(14, 90 / wide))
    for axis, text in zip(axes[:, 0], labels):
        axis.text(-0.06, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=13)
    return fig


def cloud_grid(rows: Sequence[Sequence[Tensor]], columns: Sequence[str], labels: Sequence[str], colours: Sequence[str]) -> Figure:
    """Return clouds of points [N, 2] in rows, each row with its label and colour; columns: words above them."""
    fig, axes = plt.subplots(len(rows), len(columns), figsize=(6, 1.05 * len(rows) + 0.3), squeeze=False)
    for clouds, places, label, colour in zip(rows, axes, labels, colours):
        places[0].set_ylabel(label, fontsize=13)
        for cloud, axis in zip(clouds, places):
            axis.scatter(*cloud.cpu().T, s=0.6, color=colour, linewidths=0)
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    for text, axis in zip(columns, axes[0]):
        axis.set_title(text, fontsize=13)
    return fig


def png(fig: Figure) -> bytes:
    """The figure as a PNG, of as many colours as fit into 80 kB: noise has many and cannot be compressed. The same bytes every time."""
    file = BytesIO()
    fig.savefig(file, format="png", facecolor="white", metadata={"Software": None})
    drawn = Image.open(BytesIO(file.getvalue())).convert("RGB")
    for colours in (256, 128, 64, 32):
        if file.tell() > LARGEST:
            file = BytesIO()
            drawn.quantize(colours, Image.Quantize.FASTOCTREE).save(file, format="PNG", optimize=True)
    return file.getvalue()


def in_notebook() -> bool:
    return "ipykernel" in sys.modules and sys.modules["ipykernel"].kernelapp.IPKernelApp.initialized()
