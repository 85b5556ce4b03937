"""The whole recipe of the bundled model in a folder: a model, a judge of its pictures, what the judge says, and the model's card.

    run.py -> model -.
    judge.py -> judge +-> evaluation -> figures.json -.
                      `-> VAE's PSNR, forty pictures --+-> README.md
                                  seconds of each stage '

    folder/...                 what run.py leaves there
    folder/judge.pt            state of the judge's training
    folder/evaluation.pt       verdicts up to now
    folder/figures.json        the evaluation's record
    folder/times.json          how long each stage took, and on what
    folder/pictures.png        forty fixed prompts, nothing selected
    folder/README.md           the card

Each stage goes on where it was stopped. The files of the weights are the caller's business.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from minidiff.config import ModelConfig
from minidiff.evaluation.bundled import evaluate, held_out_psnr
from minidiff.evaluation.clip import Judge
from minidiff.evaluation.figures import Record, as_json, from_json
from minidiff.evaluation.prompts import fixed_prompts
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.scenes import prompts
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.trainers import processes
from minidiff.trainers.card import card
from minidiff.trainers.judge import JUDGE_SETTINGS, JudgeTask, judge_config
from minidiff.trainers.loop import Training
from minidiff.trainers.recipe import Recipe, Settings
from minidiff.trainers.run import Progress, averaged, compiling_on, foretold, logged, run_from_scratch, seconds_a_step, timed
from minidiff.trainers.state import write_text
from minidiff.unet import UNet
from minidiff.vae import VAE
from minidiff.viz import grid, save_png

SEEDS = (0, 1, 2)  # of the evaluation
SAMPLE_STEPS = 25  # of the card's pictures
WRITE_EVERY = 30.0  # seconds between two looks at the clock that are written down


def run_bundled(
    config: ModelConfig,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    save: Callable[[StableDiffusion, str], None],
    save_judge: Callable[[Judge], None],
    init: StableDiffusion | None = None,
    vae: VAE | None = None,
) -> Iterator[Progress]:
    """Makes everything in `folder`, or goes on with what stands there; calls `save` and `save_judge` with what was trained.

    The arguments, and what it raises, as in run_from_scratch. Evaluation and card are process 0's alone.
    """
    made: list[StableDiffusion] = []

    def keep(sd: StableDiffusion, name: str) -> None:
        made.append(sd)
        save(sd, name)

    def stages() -> Iterator[Progress]:
        yield from run_from_scratch(config, recipe, folder, device, keep, init, vae)
        judge = yield from trained_judge(recipe, folder, device)
        if processes.number() > 0:
            return
        save_judge(judge)
        record = yield from evaluated(made[0], judge, folder)
        if not (folder / "README.md").exists():
            yield from pictured(made[0], folder / "pictures.png")
            times = json.loads((folder / "times.json").read_text())
            text = card(made[0], recipe, judge_settings(recipe, device), times, held_out_psnr(made[0]), record)
            write_text(folder / "README.md", text)

    return clocked(stages(), folder / "times.json", device)


def judge_settings(recipe: Recipe, device: torch.device) -> Settings:
    compile = compiling_on(device, recipe).compile and device.type != "cpu"  # as with the VAE, there is nothing to gain
    return dataclasses.replace(JUDGE_SETTINGS, seed=recipe.seed, compile=compile)


def trained_judge(recipe: Recipe, folder: Path, device: torch.device) -> Generator[Progress, None, Judge]:
    """The steps that are left; the generator's value is the judge with its averaged weights."""
    settings = judge_settings(recipe, device)
    training = Training(JudgeTask(judge_config(), settings.seed, device), settings, device, folder / "judge.pt")
    yield from logged("judge", training, folder)
    return averaged(training, "judge")


def evaluated(sd: StableDiffusion, judge: Judge, folder: Path) -> Generator[Progress, None, Record]:
    """The pictures that are left; the generator's value is the record."""
    path = folder / "figures.json"
    if path.exists():
        return from_json(path.read_text(encoding="utf-8"))
    for progress in evaluate(sd, judge, seeds=SEEDS, state=folder / "evaluation.pt"):
        yield Progress("evaluation", progress.done, progress.total)
    write_text(path, as_json(progress.record))
    return progress.record


def pictured(sd: StableDiffusion, path: Path) -> Iterator[Progress]:
    """Forty fixed prompts, prompt i on seed i."""
    texts = [prompt.text for prompt in prompts()]
    for step in sd.denoise(texts, seeds=range(len(texts)), steps=SAMPLE_STEPS):
        yield Progress("card", step.i + 1, SAMPLE_STEPS)
    save_png(grid(to_images(sd.decode(step.x_t)), columns=8), path)


def clocked(walk: Iterator[Progress], path: Path, device: torch.device) -> Iterator[Progress]:
    """The same, with the seconds and the devices of each stage kept in a file, over as many runs as it takes."""
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name, last, written = device_name(device), time.monotonic(), 0.0

    def write() -> None:
        if times and processes.number() == 0:
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


def device_name(device: torch.device) -> str:
    """As "NVIDIA H200", or "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def foretold_bundled(
    config: ModelConfig, recipe: Recipe, device: torch.device, init: StableDiffusion | None = None, vae: VAE | None = None
) -> dict[str, float]:
    """Seconds that each stage will take on this device, as run.foretold for those of the model."""
    settings = judge_settings(recipe, device)
    task = JudgeTask(judge_config(), settings.seed, device)
    judging = settings.steps * seconds_a_step(task, settings, device)
    parts = TextEncoder(config.text_encoder), UNet(config.unet), VAE(config.vae)
    sd = StableDiffusion(config, *(part.to(device) for part in parts), Tokenizer(config.tokenizer))
    _, drawing = timed(evaluate(sd, task.judge.eval(), seeds=SEEDS[:1], limit=4))
    return foretold(config, recipe, device, init, vae) | {"judge": judging, "evaluation": drawing / 4 * len(SEEDS) * len(fixed_prompts())}
