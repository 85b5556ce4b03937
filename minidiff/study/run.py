"""All runs of the study, one after the other or several at once; each leaves one small file, so that the study can be stopped anywhere.

folder/made-by.json          of which model and which plan the runs are, and the machine that began them
folder/results/NAME.json     the run, its scores, what it cost
folder/features/NAME.npy     the judge's features of its class pictures, float16: for KID over many runs
folder/rows/NAME.png         a row of its pictures: subject, class, new prompts
folder/pictures, class, learned    what runs are given, and share
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

from minidiff.bench.common import machine
from minidiff.bundled.judge import Judge
from minidiff.evaluation.alignment import drift
from minidiff.files import atomic_write, digest, ensure_same_run, tensor_bytes, write_text
from minidiff.pictures import grid, save_png, to_pixels
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.study import measure
from minidiff.study.learn import Learned, learned, style_pictures, training_pictures
from minidiff.study.plan import STEPS, SUBJECTS, UNTOUCHED, VARIANTS, Run, variants


@dataclass(frozen=True)
class Progress:
    """A run that ended: done of total, its name, and the seconds that are left for the others."""

    done: int
    total: int
    name: str
    left: float


def study(
    folder: Path,
    runs: Sequence[Run],
    load: Callable[[], StableDiffusion],
    load_judge: Callable[[], Judge],
    *,
    jobs: int = 1,
    threads: int | None = None,
) -> Iterator[Progress]:
    """Makes the runs that are not there yet; yields after each. load, load_judge: called in each process.

    jobs: processes at once. threads: of each; by default the cores are shared out. Raises ValueError for a folder of another model's runs.
    """
    belong(folder, load())
    waiting = [run for run in runs if not (folder / "results" / f"{run.name}.json").exists()]
    start, total = time.monotonic(), len(waiting)
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    if jobs == 1:
        torch.set_num_threads(threads)
        for done, run in enumerate(waiting, start=1):
            one(folder, run, load, load_judge)
            yield Progress(done, total, run.name, (time.monotonic() - start) / done * (total - done))
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        going = {pool.submit(one, folder, run, load, load_judge): run for run in waiting}
        try:
            for done, future in enumerate(as_completed(going), start=1):
                future.result()
                yield Progress(done, total, going[future].name, (time.monotonic() - start) / done * (total - done))
        finally:
            pool.shutdown(cancel_futures=True)


def belong(folder: Path, sd: StableDiffusion) -> None:
    """Notes in a new folder which model and which plan its runs are of. Raises ValueError for a folder of others: their numbers do not mix."""
    plan = {part: variants(part) for part in VARIANTS}
    made_by = {
        "model": digest(tensor_bytes(p.float()) for p in sd.unet.parameters())[:16],
        "plan": digest([repr((plan, STEPS)).encode()])[:16],
        "machine": machine(),
    }
    ensure_same_run(folder / "made-by.json", made_by, holds="runs of another kind", ignore=("machine",))


def made_on(folder: Path) -> dict[str, object]:
    """The machine on which the runs of a folder were begun."""
    return json.loads((folder / "made-by.json").read_text(encoding="utf-8"))["machine"]


def one(folder: Path, run: Run, load: Callable[[], StableDiffusion], load_judge: Callable[[], Judge]) -> None:
    """Trains, measures, and writes one run's files, the result last."""
    sd, judge = load(), load_judge()
    before = untouched_features(folder, run, sd, judge)
    learning = learned(sd, run, folder)
    with learning.on(sd):
        found = looked_at(sd, judge, run, learning)
    scores = found.scores | {"drift": float(drift(found.of_others, before).mean())}
    for name in ("results", "features", "rows"):
        (folder / name).mkdir(exist_ok=True)
    save_png(grid(to_images(found.pictures), columns=len(found.pictures)), folder / "rows" / f"{run.name}.png")
    np.save(folder / "features" / f"{run.name}.npy", found.of_class.numpy().astype(np.float16))
    costs = {name: getattr(learning, name) for name in ("trained", "bytes", "seconds", "memory", "changes")}
    path = folder / "results" / f"{run.name}.json"
    write_text(path, json.dumps({"run": asdict(run), "scores": scores, **costs}, indent=1))


def looked_at(sd: StableDiffusion, judge: Judge, run: Run, learning: Learned) -> measure.Measured:
    """What the model with what was learned draws."""
    if run.part == "style":
        given = style_pictures(run.seed)
        found = measure.style_measured(sd, judge, learning.called[0], [name for _, name in given])
        chroma_given = measure.chroma(to_pixels(np.stack([np.asarray(picture) for picture, _ in given])))
        return replace(found, scores=found.scores | {"chroma_given": chroma_given})
    things = []
    for subject, words in zip(run.subjects, learning.called):
        pictures = to_pixels(np.stack([np.asarray(picture) for picture in training_pictures(subject, run.seed)]))
        things.append(measure.Thing(subject, SUBJECTS[subject], words, pictures))
    return measure.measured(sd, judge, things)


def untouched_features(folder: Path, run: Run, sd: StableDiffusion, judge: Judge) -> torch.Tensor:
    """Features of the other prompts' pictures before training; the same for all runs of the subjects."""
    classes = [SUBJECTS[name] for name in run.subjects]
    path = folder / "features" / f"{UNTOUCHED}-{'-'.join(classes) or 'style'}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        features, _ = measure.other_features(sd, judge, classes)
        with atomic_write(path) as file:
            np.save(file, features.numpy())
    return torch.from_numpy(np.load(path))
