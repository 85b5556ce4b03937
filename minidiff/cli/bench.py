"""The benchmarks of the command line: `minidiff bench load`, `attention`, `step`, `image`, `train`, `gpu`.

Each prints a Markdown table, and with --out writes all its numbers. Imports that take long are inside the commands that need them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from minidiff.cli.flags import Whole, check_least
from minidiff.cli.model import choose_device

Models = Literal["sd1", "sd2", "sdxl", "bundled"]
Names = tuple[str, ...]


def load(against: bool = True, out: Path | None = None, rounds: int = 3) -> None:
    """Time loading a full-size Stable Diffusion 1.x of random weights, beside diffusers.

        minidiff bench load --out load.json

    Takes minutes, and up to 4.3 GB of disk at a time in the folder for temporary files.

    Args:
        against: measure diffusers as well
        out: a .json file for the results
        rounds: how often each loads each file
    """
    from minidiff.bench.load import bench_load

    check_least(1, rounds=rounds)
    show(bench_load(against, out, rounds))


def attention(
    out: Path | None = None,
    rounds: Whole = None,
    models: tuple[Models, ...] = ("sd1", "sd2"),
    sizes: tuple[int, ...] = (),
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = (),
    device: str = "auto",
    contender: Names = (),
    batch: int = 2,
) -> None:
    """Time attention at every shape of a U-Net step, beside all of PyTorch's ways.

        minidiff bench attention --models sd1 --out attention.json

    Begun with the same flags and --out, a run that was stopped goes on at the shape where it stopped.

    Args:
        out: a .json file for the results, written after each contender
        rounds: how often each takes its turn; 5 on a GPU, 3 on a CPU by default
        models: whose shapes
        sizes: of pictures, in pixels; 512 and 768 on a GPU, 512 on a CPU by default, and the bundled model's own
        dtypes: bfloat16 by default; on a CPU float32 too
        device: auto, cpu, cuda, cuda:1
        contender: only these: minidiff, triton, flash, efficient, cudnn, math, flex, "by hand"; all by default
        batch: rows; a picture with guidance has 2
    """
    from minidiff.bench.attention import CONTENDERS, bench_attention

    check_least(1, rounds=rounds, batch=batch, sizes=min(sizes, default=None))
    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    rounds = (3 if on_cpu else 5) if rounds is None else rounds
    sizes = sizes or ((128,) if models == ("bundled",) else (512,) if on_cpu else (512, 768))
    dtypes = dtypes or (("float32", "bfloat16") if on_cpu else ("bfloat16",))
    show(bench_attention(out, rounds, models, sizes, dtypes, str(chosen), contender or CONTENDERS, batch))


def step(
    against: bool = True,
    out: Path | None = None,
    rounds: Whole = None,
    model: Models = "sd1",
    size: Whole = None,
    device: str = "auto",
    max_autotune: bool = False,
    controlnet: bool = False,
    contender: Names = (),
) -> None:
    """Time a U-Net step of one picture with guidance on random weights, beside diffusers.

        minidiff bench step --out step.json

    Takes 4.3 GB of disk in the folder for temporary files, for sdxl 13.9 GB.

    Args:
        against: measure diffusers as well
        out: a .json file for the results, written after each contender and each round
        rounds: how often each takes its turn; 10 on a GPU, 3 on a CPU by default
        model: whose shapes
        size: of the picture, in pixels; the model's own by default
        device: auto, cpu, cuda, cuda:1
        max_autotune: diffusers compiled by max-autotune as well, which takes minutes
        controlnet: measure all of it again with a ControlNet, and what that adds; 1.4 GB more of disk
        contender: only these, such as minidiff "diffusers compiled"; all by default
    """
    from minidiff.bench.race import RaceRules
    from minidiff.bench.step import bench_step

    check_least(1, rounds=rounds, size=size)
    rules = RaceRules(contender)
    show(bench_step(against, out, rounds, model, size, str(choose_device(device)), max_autotune, controlnet, rules))


def image(
    against: bool = True,
    out: Path | None = None,
    rounds: Whole = None,
    model: Models = "sd1",
    size: Whole = None,
    steps: Whole = None,
    device: str = "auto",
    max_autotune: bool = False,
    contender: Names = (),
) -> None:
    """Time a whole picture, from the prompt to pixels, on random weights, beside diffusers.

        minidiff bench image --rounds 1 --out image.json

    Takes 4.3 GB of disk in the folder for temporary files, for sdxl 13.9 GB.

    Args:
        against: measure diffusers as well
        out: a .json file for the results, written after each contender and each round
        rounds: how often each takes its turn; 5 on a GPU, 2 on a CPU by default
        model: whose shapes
        size: of the picture, in pixels; the model's own by default
        steps: of the sampler, DDIM; 50 on a GPU, 4 on a CPU by default
        device: auto, cpu, cuda, cuda:1
        max_autotune: diffusers compiled by max-autotune as well, which takes minutes
        contender: only these, such as minidiff "diffusers compiled"; all by default
    """
    from minidiff.bench.image import bench_image
    from minidiff.bench.race import RaceRules

    check_least(1, rounds=rounds, size=size, steps=steps)
    rules = RaceRules(contender)
    show(bench_image(against, out, rounds, model, size, steps, str(choose_device(device)), max_autotune, rules))


def train(
    against: bool = True,
    out: Path | None = None,
    rounds: Whole = None,
    model: Models = "sd1",
    size: Whole = None,
    methods: tuple[Literal["lora", "custom-diffusion"], ...] = ("lora", "custom-diffusion"),
    device: str = "auto",
    contender: Names = (),
) -> None:
    """Time a training step on random weights, beside the loops of diffusers' examples.

        minidiff bench train --methods lora --out train.json

    Takes 4.3 GB of disk in the folder for temporary files, for sdxl 13.9 GB.

    Args:
        against: measure diffusers, and peft for the LoRA, as well
        out: a .json file for the results, written after each contender and each round
        rounds: how often each takes its turn; 10 on a GPU, 2 on a CPU by default
        model: whose shapes
        size: of the pictures, in pixels; the model's own by default, on a CPU half of it
        methods: which trainings
        device: auto, cpu, cuda, cuda:1
        contender: only these, such as minidiff "diffusers channels-last"; all by default
    """
    from minidiff.bench.race import RaceRules
    from minidiff.bench.train import bench_train

    check_least(1, rounds=rounds, size=size)
    show(bench_train(against, out, rounds, model, size, methods, str(choose_device(device)), RaceRules(contender)))


def gpu(out: Path, minutes: float = 8.0, device: str = "auto", contender: Names = ()) -> None:
    """Check and time everything on one GPU in a few minutes: kernels, the model, attention, a step, a picture, training.

        minidiff bench gpu --minutes 8 --out gpu

    Each stage has its share of the time, and each number is written as soon as it is known. On a CPU all of it runs in miniature.

    Args:
        out: folder for the results; gpu.md is the report
        minutes: for everything
        device: auto, cpu, cuda, cuda:1
        contender: only these, of any stage; all by default
    """
    from minidiff.bench.gpu import bench_gpu

    show(bench_gpu(out, minutes, str(choose_device(device)), contender))


def show(lines: Iterator[str]) -> None:
    """Print the lines as they come."""
    for line in lines:
        print(line, flush=True)


COMMANDS = {"load": load, "attention": attention, "step": step, "image": image, "train": train, "gpu": gpu}
