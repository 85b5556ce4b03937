"""The smallest thing to train, for the tests of the loop, and processes that run and die beside the test."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
from torch import nn

from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.loop import randn_per_sample, rng_for
from minidiff.trainers.engine.optimizer import adamw
from minidiff.trainers.engine.settings import Settings

CPU = torch.device("cpu")


def small_settings(**changes) -> Settings:
    """A run in which everything that a state must hold takes part."""
    usual = {"steps": 10, "batch": 4, "learning_rate": 0.03, "warmup_steps": 3, "schedule": "cosine", "ema_decay": 0.9, "save_every": 3}
    return Settings(**usual | changes)


class SmallTask:
    """Learns y = |x| with two layers; `at` is called with the step and the samples before a loss, to break in."""

    def __init__(self, dropout=0.0, width=8, at: Callable[[int, range], None] = lambda step, samples: None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 3))
        self.modules, self.at = {"net": self.net}, at
        self.about = {"method": "small"}

    def optimizers(self, settings):
        first, last = self.net[0], self.net[3]
        groups = [{"params": list(first.parameters()), "scale": 0.5}, {"params": list(last.parameters())}]
        return (adamw(groups, settings),)

    def loss(self, step, samples):
        self.at(step, samples)
        x = randn_per_sample([rng_for(7, step, sample) for sample in samples], (3,))
        return (self.net(x).float() - x.abs()).square().mean()


def forked(function: Callable[[], None]) -> int | None:
    """Runs the function in a process of its own; gives its exit code, -9 if it was killed."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def together(count: int, function: Callable[[], None]) -> list[int | None]:
    """Runs the function in several processes that have joined as under torchrun; gives their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(number: int):
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": number, "LOCAL_RANK": number}
        os.environ.update({name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "test"})
        distributed.init_distributed(CPU)
        function()
        distributed.destroy_distributed()

    members = [multiprocessing.get_context("fork").Process(target=member, args=(number,)) for number in range(count)]
    for one in members:
        one.start()
    for one in members:
        one.join(60)
        one.kill()
    return [one.exitcode for one in members]
