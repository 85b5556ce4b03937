"""Make all runs of the study, one after the other or several at once. Each leaves small files, so the study can be stopped anywhere.

folder/made-by.json          the model and the plan that the runs belong to, and the machine that began them
folder/results/NAME.json     the run, its scores, what it cost
folder/features/NAME.npy     the judge's features of its class pictures, float16, for KID over many runs
folder/rows/NAME.png         a row of its pictures: subject, class, new prompts
folder/pictures, class, learned    what runs are given and share
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from minidiff.bundled.judge import Judge
from minidiff.evaluation.alignment import drift
from minidiff.files import atomic_write, digest, ensure_same_run, tensor_bytes, write_text
from minidiff.machine import read_machine
from minidiff.pictures import grid, save_png, to_pixels
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.study import measure
from minidiff.study.learn import Outcome, draw_style_pictures, draw_training_pictures, train_run
from minidiff.study.plan import STEPS, SUBJECTS, UNTOUCHED, VARIANTS, StudyRun, variants


@dataclass(frozen=True)
class StudyProgress:
    """A finished run: its number of the total, its name, and the estimated seconds left for the others."""

    done: int
    total: int
    name: str
    left: float


def run_study(
    folder: Path,
    runs: Sequence[StudyRun],
    load: Callable[[], StableDiffusion],
    load_judge: Callable[[], Judge],
    *,
    jobs: int = 1,
    threads: int | None = None,
) -> Iterator[StudyProgress]:
    """Make the runs that are not there yet, and yield after each. Raises ValueError for a folder with another model's or plan's runs.

    Args:
        folder: For all files.
        runs: Of the plan, in this order.
        load: Gives the model; called in each process and for each run.
        load_judge: Gives the judge, likewise.
        jobs: Processes at once.
        threads: Of each process; by default the cores are shared out.
    """
    claim_folder(folder, load())
    waiting = [run for run in runs if not (folder / "results" / f"{run.name}.json").exists()]
    start, total = time.monotonic(), len(waiting)
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    if jobs == 1:
        torch.set_num_threads(threads)
        for done, run in enumerate(waiting, start=1):
            run_one(folder, run, load, load_judge)
            yield StudyProgress(done, total, run.name, (time.monotonic() - start) / done * (total - done))
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        going = {pool.submit(run_one, folder, run, load, load_judge): run for run in waiting}
        try:
            for done, future in enumerate(as_completed(going), start=1):
                future.result()
                yield StudyProgress(done, total, going[future].name, (time.monotonic() - start) / done * (total - done))
        finally:
            pool.shutdown(cancel_futures=True)


def claim_folder(folder: Path, sd: StableDiffusion) -> None:
    """Claim the folder for the model and the plan. Raises ValueError if it has runs of others: their numbers do not mix."""
    plan = {part: variants(part) for part in VARIANTS}
    made_by = {
        "model": digest(tensor_bytes(p.float()) for p in sd.unet.parameters())[:16],
        "plan": digest([repr((plan, STEPS)).encode()])[:16],
        "machine": read_machine(),
    }
    ensure_same_run(folder / "made-by.json", made_by, holds="runs of another kind", ignore=("machine",))


def run_one(folder: Path, run: StudyRun, load: Callable[[], StableDiffusion], load_judge: Callable[[], Judge]) -> None:
    """Train, measure and write one run's files, the result last.

    Args:
        folder: Of the study.
        run: The training to make and measure.
        load: Returns the untouched model.
        load_judge: Returns the judge.
    """
    sd, judge = load(), load_judge()  # its own: training changes it
    before = load_untouched_features(folder, run, sd, judge)
    outcome = train_run(sd, run, folder)
    for adapter in outcome.adapters:
        adapter.attach(sd)
    found = measure_run(sd, judge, run, outcome)
    scores = found.scores | {"drift": float(drift(found.of_others, before).mean())}
    for name in ("results", "rows"):
        (folder / name).mkdir(exist_ok=True)
    save_png(grid(to_images(found.pictures), columns=len(found.pictures)), folder / "rows" / f"{run.name}.png")
    np.save(folder / "features" / f"{run.name}.npy", found.of_class.numpy().astype(np.float16))
    costs = {name: getattr(outcome, name) for name in ("trained", "bytes", "seconds", "memory", "changes")}
    write_text(folder / "results" / f"{run.name}.json", json.dumps({"run": asdict(run), "scores": scores, **costs}, indent=1))


def measure_run(sd: StableDiffusion, judge: Judge, run: StudyRun, outcome: Outcome) -> measure.Measurements:
    """Measure the pictures of the model as the run left it.

    Args:
        sd: The model with what was learned attached.
        judge: Recognises and compares pictures.
        run: The training that was made.
        outcome: Of the training; its prompt names are read.
    """
    if run.part == "style":
        given = draw_style_pictures(run.seed)
        found = measure.measure_style(sd, judge, outcome.prompt_names[0], [name for _, name in given])
        return replace(found, scores=found.scores | {"chroma_given": measure.chroma(stack([picture for picture, _ in given]))})
    things = [
        measure.TaughtSubject(subject, SUBJECTS[subject], words, stack(draw_training_pictures(subject, run.seed)))
        for subject, words in zip(run.subjects, outcome.prompt_names)
    ]
    return measure.measure_subjects(sd, judge, things)


def stack(pictures: Sequence[Image.Image]) -> Float[torch.Tensor, "B 3 H W"]:
    """Convert pictures of one size to pixels in [-1, 1]."""
    return to_pixels(np.stack([np.asarray(picture) for picture in pictures]))


def load_untouched_features(folder: Path, run: StudyRun, sd: StableDiffusion, judge: Judge) -> torch.Tensor:
    """Return the features of the other prompts' pictures before training, from a file once a run of these subjects has made them.

    Args:
        folder: Of the study.
        run: Its subjects are read.
        sd: The untouched model.
        judge: Computes the features.
    """
    classes = [SUBJECTS[name] for name in run.subjects]
    path = folder / "features" / f"{UNTOUCHED}-{'-'.join(classes) or 'style'}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        features, _ = measure.measure_others(sd, judge, classes)
        with atomic_write(path) as file:
            np.save(file, features.numpy())
    return torch.from_numpy(np.load(path))
