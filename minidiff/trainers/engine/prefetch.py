"""The random part of a step, computed before the step comes: on a GPU no step waits for data.

    draw(step, sample_ids) -> scenes, noise, ...      on a CPU: here, since the training needs the cores anyway
                                                      on a GPU: in processes alongside the training

All randomness of a sample comes from its numbers alone (see loop.py), so a draw is the same wherever and whenever it is made.
"""

import os
import pickle
import signal
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from minidiff.trainers.engine import distributed

Draw = Callable[[int, range], Any]
MOST_WORKERS = 16  # composing the judge's scenes for a GPU keeps about that many cores busy


def prefetch(draw: Draw, device: torch.device) -> Draw:
    """Return the function as it is, or for a GPU one whose answers are prefetched; it must be picklable, as a partial of a function is."""
    if device.type != "cuda":
        return draw
    return Prefetcher(draw, max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // distributed.world_size() - 1)))


class Prefetcher:
    """Call draw(step, sample_ids) for one step after the other; while one is trained on, other processes compute the next ones."""

    def __init__(self, draw: Draw, workers: int):
        self.draw, self.workers = draw, workers
        self.waiting: dict[tuple[int, range], Future] = {}
        # Not forked: a process that has begun to use CUDA cannot be.
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker)
        weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)

    def __call__(self, step: int, sample_ids: range) -> Any:
        for later in range(step, step + 2 * self.workers + 1):
            if (later, sample_ids) not in self.waiting:
                self.waiting[later, sample_ids] = self.pool.submit(draw_pickled, self.draw, later, sample_ids)
        return pickle.loads(self.waiting.pop((step, sample_ids)).result())


def begin_worker() -> None:
    """Prepare a worker process: one thread, deaf to Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which saves


def draw_pickled(draw: Draw, step: int, sample_ids: range) -> bytes:
    """Draw, and return bytes: between processes PyTorch would put each tensor into shared memory, of which containers have little."""
    return pickle.dumps(draw(step, sample_ids))
