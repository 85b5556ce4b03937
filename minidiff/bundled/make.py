"""Make the bundled model in a folder: the model, a judge of its pictures, the evaluation, and the model's card.

    run.py -> model -.
    judge.py -> judge +-> evaluation -> figures.json -.
                      `-> VAE's PSNR, forty pictures --+-> README.md
                                  seconds of each stage '

    folder/...                 the files of run.py
    folder/judge.pt            state of the judge's training
    folder/evaluation.pt       verdicts so far
    folder/figures.json        the evaluation's record
    folder/times.json          how long each stage took, and on which device
    folder/pictures.png        forty fixed prompts, nothing selected
    folder/README.md           the card

Each stage resumes where it was stopped. The caller writes the weights.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from minidiff.bundled.card import format_card
from minidiff.bundled.evaluate import evaluate, held_out_psnr
from minidiff.bundled.figures import EvaluationRecord, from_json, to_json
from minidiff.bundled.judge import Judge
from minidiff.bundled.recipe import Recipe
from minidiff.bundled.run import (
    StageProgress,
    copy_averaged,
    estimate_seconds,
    resolve_compile,
    run_from_scratch,
    run_logged,
    time_first,
    time_step,
)
from minidiff.bundled.train_judge import JUDGE_SETTINGS, JudgeTask, judge_config
from minidiff.config import ModelConfig
from minidiff.files import write_text
from minidiff.machine import format_device
from minidiff.pictures import grid, save_png
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.prompts import fixed_prompts, prompts
from minidiff.text_encoder import TextEncoder
from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.loop import Training
from minidiff.trainers.engine.settings import Settings
from minidiff.two_encoders import text_side
from minidiff.unet import UNet
from minidiff.vae import VAE

SEEDS = (0, 1, 2)  # of the evaluation
SAMPLE_STEPS = 25  # of the card's pictures
WRITE_EVERY = 30.0  # seconds between two looks at the clock that are written down


def run_bundled(
    config: ModelConfig,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    save: Callable[[StableDiffusion], None],
    save_judge: Callable[[Judge], None],
    init: StableDiffusion | None = None,
    vae: VAE | None = None,
) -> Iterator[StageProgress]:
    """Make everything in `folder`, or resume what is there. Only process 0 evaluates and writes the card. Raises like run_from_scratch.

    Args:
        config: Of the model.
        recipe: Its numbers.
        folder: For all files.
        device: To train on.
        save: Called with the model.
        save_judge: Called with the judge.
        init: A model to train further.
        vae: One to take as it is.
    """

    def stages() -> Generator[StageProgress, None, None]:
        sd = yield from run_from_scratch(config, recipe, folder, device, save, init, vae)
        judge = yield from run_judge_training(recipe, folder, device)
        if distributed.rank() > 0:
            return
        save_judge(judge)
        record = yield from run_evaluation(sd, judge, folder)
        if not (folder / "README.md").exists():
            yield from draw_card_pictures(sd, folder / "pictures.png")
            times = json.loads((folder / "times.json").read_text())
            text = format_card(sd, recipe, judge_settings(recipe, device), times, held_out_psnr(sd), record)
            write_text(folder / "README.md", text)

    return record_times(stages(), folder / "times.json", device)


def judge_settings(recipe: Recipe, device: torch.device) -> Settings:
    """Return the settings of the judge's training."""
    compile = resolve_compile(device, recipe).compile and device.type != "cpu"  # as with the VAE, there is nothing to gain
    return dataclasses.replace(JUDGE_SETTINGS, seed=recipe.seed, compile=compile)


def run_judge_training(recipe: Recipe, folder: Path, device: torch.device) -> Generator[StageProgress, None, Judge]:
    """Take the steps that are left. The generator's return value is the judge with its EMA weights."""
    settings = judge_settings(recipe, device)
    task = JudgeTask(judge_config(), settings.seed, device)
    training = Training(task, settings, device, folder / "judge.pt")
    yield from run_logged("judge", training, folder)
    return copy_averaged(task.judge, training.ema["judge"])


def run_evaluation(sd: StableDiffusion, judge: Judge, folder: Path) -> Generator[StageProgress, None, EvaluationRecord]:
    """Judge the pictures that are left. The generator's return value is the record."""
    path = folder / "figures.json"
    if path.exists():
        return from_json(path.read_text(encoding="utf-8"))
    record = None
    for progress in evaluate(sd, judge, seeds=SEEDS, state=folder / "evaluation.pt"):
        yield StageProgress("evaluation", progress.done, progress.total)
        record = progress.record
    assert record is not None, "the last progress has the record"
    write_text(path, to_json(record))
    return record


def draw_card_pictures(sd: StableDiffusion, path: Path) -> Generator[StageProgress, None, None]:
    """Draw forty fixed prompts, prompt i on seed i."""
    texts = [prompt.text for prompt in prompts()]
    x_t = None
    for step in sd.denoise(texts, seeds=range(len(texts)), steps=SAMPLE_STEPS):
        x_t = step.x_t
        yield StageProgress("card", step.i + 1, SAMPLE_STEPS)
    assert x_t is not None
    save_png(grid(to_images(sd.decode(x_t)), columns=8), path)


def record_times(walk: Generator[StageProgress, None, None], path: Path, device: torch.device) -> Iterator[StageProgress]:
    """Pass a run's progress on, and keep the seconds and devices of each stage in a file, summed over interrupted runs."""
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name, last, written = format_device(device), time.monotonic(), 0.0

    def write() -> None:
        if times and distributed.rank() == 0:
            write_text(path, json.dumps(times, indent=1))

    with closing(walk), ExitStack() as end:
        end.callback(write)
        for progress in walk:
            now = time.monotonic()
            stage = times.setdefault(progress.stage, {"seconds": 0.0, "devices": []})
            stage["seconds"] += now - last
            stage["devices"] += [name] * (name not in stage["devices"])
            last = now
            if progress.i == progress.steps or now - written > WRITE_EVERY:
                write()
                written = now
            yield progress


def estimate_bundled_seconds(
    config: ModelConfig, recipe: Recipe, device: torch.device, init: StableDiffusion | None = None, vae: VAE | None = None
) -> dict[str, float]:
    """Estimate the seconds of each stage on this device, as run.estimate_seconds does for the model alone.

    Args:
        config: Of the model.
        recipe: Its numbers.
        device: To train on.
        init: A model to train further.
        vae: One to take as it is.
    """
    settings = judge_settings(recipe, device)
    task = JudgeTask(judge_config(), settings.seed, device)
    judging = settings.steps * time_step(task, settings, device)
    text = text_side(config, {"text_encoder": TextEncoder(config.text_encoder).to(device)})
    sd = StableDiffusion(config, text, UNet(config.unet).to(device), VAE(config.vae).to(device))
    _, drawing = time_first(evaluate(sd, task.judge.eval(), seeds=SEEDS[:1], limit=4))
    return estimate_seconds(config, recipe, device, init, vae) | {
        "judge": judging,
        "evaluation": drawing / 4 * len(SEEDS) * len(fixed_prompts()),
    }
