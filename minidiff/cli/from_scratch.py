"""`minidiff train from-scratch`: a small Stable Diffusion on composed scenes, as bundled/run.py and bundled/make.py train it."""

import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from minidiff.bundled.recipe import RECIPES, Recipe
from minidiff.cli.endings import finish, readers
from minidiff.cli.flags import Attentions, Text, Whole, command_class, flag_groups, given, parse_flags, summary
from minidiff.cli.model import load, print_notes, training_on
from minidiff.cli.names import check_folder
from minidiff.trainers.methods.override import override

if TYPE_CHECKING:
    import torch

    from minidiff.bundled.judge import Judge
    from minidiff.bundled.run import StageProgress
    from minidiff.pipeline import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class ScratchFlags:
    """Train a small Stable Diffusion from scratch on composed scenes.

        minidiff train from-scratch runs/half --recipe half --vae tiny

    The VAE comes first, then text encoder and U-Net together.
    Stopped at any time and started again with the same arguments, it resumes from its last state.

    Args:
        out: folder of the run; the model ends there as model.safetensors, and its parts, in half precision, alongside
        recipe: bundled makes a judge, its figures and a card as well; half is a smaller, half-trained model; without it the model alone
        init: a checkpoint of the bundled model's kind to train on from; its VAE is kept
        vae: a checkpoint whose VAE is taken as it is; text encoder and U-Net begin from scratch
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is computed: auto takes what is fastest; triton is this package's kernels, on a GPU
        threads: CPU threads to use; all cores by default
    """

    out: tyro.conf.Positional[Path]
    recipe: Literal["bundled", "half"] | None = None
    init: Text = None
    vae: Text = None
    device: str = "auto"
    attention: Attentions = "auto"
    threads: Whole = None


def from_scratch(args: list[str]) -> None:
    """Parse the flags, train, and write the model."""
    from minidiff.bundled.make import estimate_bundled_seconds, run_bundled
    from minidiff.bundled.run import claim_folder, estimate_seconds, run_from_scratch
    from minidiff.bundled.tasks import bundled_config

    command = command_class({"run": (ScratchFlags,)} | flag_groups(Recipe, presets=RECIPES))
    asked = vars(parse_flags(command, "train from-scratch", summary(ScratchFlags), args))
    flags: ScratchFlags = asked["run"]
    check_folder(flags.out)
    out, recipe = flags.out, override(RECIPES[flags.recipe or "bundled"], given(asked.values(), Recipe))
    with training_on(flags.device, flags.threads, flags.attention) as device:
        init, other = (load(file, "float32", device) if file else None for file in (flags.init, flags.vae))
        config = init.config if init else bundled_config(recipe.widths)
        config = replace(config, vae=other.config.vae) if other else config
        vae = other.vae if other else None
        claim_folder(out, config, recipe, init, vae)
        if flags.recipe == "bundled":
            print_forecast(lambda: estimate_bundled_seconds(config, recipe, device, init, vae), device, out)
            show_progress(run_bundled(config, recipe, out, device, partial(save_model, out), partial(save_judge, out), init, vae))
        else:
            print_forecast(lambda: estimate_seconds(config, recipe, device, init, vae), device, out)
            show_progress(run_from_scratch(config, recipe, out, device, partial(save_model, out), init, vae))
        model = out / "model.safetensors"
        finish(
            model, use=shlex.join(["minidiff", "generate", "a fox", "--model", str(model)]), read_by=readers("--model", "ldm", "bundled")
        )


def save_model(out: Path, sd: "StableDiffusion") -> None:
    """Write the model and its parts."""
    import weights_loader

    weights_loader.save(sd, out / "model.safetensors")
    weights_loader.save_parts(sd, out)


def save_judge(out: Path, judge: "Judge") -> None:
    """Write the judge."""
    import weights_loader

    weights_loader.save_judge(judge, out / "judge.safetensors")


def show_progress(steps: "Iterator[StageProgress]") -> None:
    """Take all steps, with a bar for each stage."""
    from tqdm import tqdm

    assert isinstance(steps, Generator)
    with closing(steps):  # stopped on the way, it saves its state
        for stage, own in groupby(steps, key=lambda step: step.stage):
            first = next(own)
            with tqdm(desc=stage, total=first.steps, initial=first.i - 1, file=sys.stderr) as bar:
                for step in chain([first], own):
                    bar.update(step.i - bar.n)
                    if step.text:
                        bar.set_postfix_str(step.text, refresh=False)


def print_forecast(forecast: "Callable[[], dict[str, float]]", device: "torch.device", out: Path) -> None:
    """Print how long each stage that has left no result yet will take, before the first one."""
    from minidiff.machine import format_device
    from minidiff.markdown import format_duration

    results = {"diffusion": "model.safetensors", "judge": "judge.safetensors", "evaluation": "figures.json"}
    if all((out / name).exists() for name in results.values()):
        return
    seconds = {stage: s for stage, s in forecast().items() if not (out / results.get(stage, "latents.pt")).exists()}
    if seconds:
        stages = ", ".join(f"{stage} {format_duration(s)}" for stage, s in seconds.items())
        print_notes([f"on {format_device(device)}, about: {stages}; {format_duration(sum(seconds.values()))} in all"])
