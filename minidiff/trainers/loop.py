"""The training loop: one for every method, and for training from nothing.

    task.loss(step, samples) -> gradients -> mean over processes -> clip -> optimizers -> averages -> TrainStep
         the method                                                                          every so often: the state file

A Task says what is trained and what the loss of a sample is; the loop says how. Whatever a task draws by chance comes from
rng_for(seed, step, sample). So a sample is the same whether its batch is made at once, by accumulation or by several processes, and a run
that is stopped and taken up again from its state ends, on a CPU, with the very same weights.
"""

import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.trainers import processes
from minidiff.trainers.checkpointing import checkpointed, thrifty_malloc
from minidiff.trainers.optimizer import ExponentialAverage, learning_rate
from minidiff.trainers.recipe import Settings
from minidiff.trainers.state import check_same, read_state, write_state

ONLY_HOW = ("batch", "accumulate", "checkpointing", "compile", "save_every")  # settings that change a run by rounding, or not at all


@runtime_checkable
class Task(Protocol):
    """What is trained.

    modules: their parameters that require a gradient are trained, and their names stand in the state file. All float32.
    loss: the mean over the samples of these numbers in the step's whole batch, each with the draws of rng_for(seed, step, number). It
        may not keep tensors for later calls, nor look at values on the device (`.item()`, `if (x > 0).any()`): the loop would wait.

    A task may also have
    networks: tuple of the modules that the loss runs through, if more than `modules`: those that checkpointing and compile mean.
    about: dict of numbers and strings that another run must not differ in to go on from the state, as the method and its data.
    """

    modules: dict[str, nn.Module]

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]: ...

    def loss(self, step: int, samples: range) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class TrainStep:
    """One step done: its number from 1, of how many; the mean loss, on the device (float() waits for it); the learning rate."""

    i: int
    steps: int
    loss: Float[Tensor, ""]
    rate: float


def train(task: Task, settings: Settings, device: torch.device, state: Path | None = None) -> Iterator[TrainStep]:
    """The steps of a run that are left, one an iteration; see Training."""
    return Training(task, settings, device, state).run()


class Training:
    """A run: the task's weights, their optimizers and averages, and how many steps are done. `averages` and `slow_averages` have one a
    module, or none.

    state: a file to go on from, if it is there, and to save to. Raises ValueError if it belongs to another run, naming what differs.
    """

    def __init__(self, task: Task, settings: Settings, device: torch.device, state: Path | None = None):
        self.task, self.settings, self.device, self.state = task, settings, device, state
        self.i = 0
        self.weights = trained_weights(task.modules)
        self.optimizers = task.optimizers(settings)
        self.averages = averages_of(task.modules, settings.average)
        self.slow_averages = averages_of(task.modules, settings.slow_average)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half_precision(settings.precision, device) == torch.float16)
        if state is not None and state.exists():
            self.load_state_dict(read_state(state))
        self.saved = self.i
        if not processes.same_everywhere(self.i, device):
            raise ValueError(f"the processes begin at different steps, this one at {self.i}: all need the same {state}")

    def run(self) -> Iterator[TrainStep]:
        """Takes the steps that are left, one an iteration. Stopped between two steps or in one, it saves the last whole step."""
        settings = self.settings
        thrifty = settings.checkpointing and self.device.type == "cpu"
        with compiled(networks_of(self.task), self.device, settings.compile), thrifty_malloc(thrifty):
            try:
                while self.i < settings.steps:
                    rate = learning_rate(self.i, settings)
                    loss = self._gradients()
                    with uninterrupted():
                        self._move(rate)
                    if self.i % settings.save_every == 0 or self.i == settings.steps:
                        self.save()
                    yield TrainStep(self.i, settings.steps, loss, rate)
            except (KeyboardInterrupt, GeneratorExit):
                self.save()
                raise

    def _gradients(self) -> Float[Tensor, ""]:
        """The gradient of the mean loss over the whole batch, in every weight's .grad."""
        settings, loss = self.settings, torch.zeros((), device=self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for samples in parts(settings):
            if settings.compile:
                torch.compiler.cudagraph_mark_step_begin()  # what the graphs gave out before may be overwritten
            with checkpointed(networks_of(self.task), settings.checkpointing):
                part = loss_of(self.task, self.i, samples, settings, self.device) / settings.accumulate
                self.scaler.scale(part).backward()
            loss += part.detach()
        return processes.average_gradients(list(self.weights.values()), loss)

    def _move(self, rate: float) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            self.scaler.step(optimizer)  # with float16 a step whose gradient overflowed is left out
        self.scaler.update()
        for averages in (self.averages, self.slow_averages):
            for name, average in averages.items():
                average.update(self.task.modules[name])
        self.i += 1

    def save(self) -> None:
        """Writes the state, if there is a new one and a file to write to."""
        if self.state is None or self.i == self.saved or processes.number() > 0:
            return
        for name, p in self.weights.items():
            if not p.isfinite().all():
                kept = f"the state of step {self.saved} is kept"
                raise ValueError(f"{name} is not finite after step {self.i}, {kept}: lower the learning rate")
        with uninterrupted():
            self.saved = self.i  # also if writing fails: it is not tried again on the way out
            write_state(self.state, self.state_dict())

    def state_dict(self) -> dict:
        """All that a run needs to go on: tensors, numbers, lists and dicts only, so that it can be read back without running code."""
        return {
            "i": self.i,
            "asked": self._asked(),
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "slow_averages": {name: average.state_dict() for name, average in self.slow_averages.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        check_same(self.state or Path("the state"), state["asked"], self._asked())
        self.i = state["i"]
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for kind in ("averages", "slow_averages"):
            for name, average in getattr(self, kind).items():
                average.load_state_dict(state[kind][name])
        self.scaler.load_state_dict(state["scaler"])

    def _asked(self) -> dict:
        """What makes a run this run and no other."""
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in ONLY_HOW}
        weights = {name: "x".join(map(str, p.shape)) for name, p in self.weights.items()}
        return settings | {"samples a step": samples_a_step(self.settings)} | getattr(self.task, "about", {}) | weights


def trained_weights(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by module and name. Raises ValueError if there is none, or one is not float32."""
    weights = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError(f"nothing in {', '.join(modules) or 'no module'} requires a gradient: there is nothing to train")
    for name, p in weights.items():
        if p.dtype != torch.float32:
            raise ValueError(f"{name} is {p.dtype}: what is trained must be float32, or small steps are rounded away")
    return weights


def averages_of(modules: dict[str, nn.Module], decay: float | None) -> dict[str, ExponentialAverage]:
    """Return an average of each module's weights, or none."""
    return {} if decay is None else {name: ExponentialAverage(module, decay) for name, module in modules.items()}


def networks_of(task: Task) -> tuple[nn.Module, ...]:
    """The modules that the task's loss runs through."""
    return getattr(task, "networks", None) or tuple(task.modules.values())


def samples_a_step(settings: Settings) -> int:
    """The size of a step's whole batch."""
    return settings.batch * settings.accumulate * processes.count()


def parts(settings: Settings) -> Iterator[range]:
    """This process's samples of a step, as many at a time as go into memory."""
    first = processes.number() * settings.accumulate
    for k in range(first, first + settings.accumulate):
        yield range(k * settings.batch, (k + 1) * settings.batch)


def loss_of(task: Task, step: int, samples: range, settings: Settings, device: torch.device) -> Float[Tensor, ""]:
    """The task's loss in the precision asked for. PyTorch's own generators, which dropout draws from, are seeded for it and given back."""
    half = half_precision(settings.precision, device)
    with seeded(int(rng_for(settings.seed, step, samples.start).integers(2**62))):
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            return task.loss(step, samples)


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The 16-bit dtype to compute in, or None for float32."""
    if precision == "auto":
        precision = "float32" if device.type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def rng_for(seed: int, step: int, sample: int) -> np.random.Generator:
    """All chance of one sample of one step."""
    return np.random.default_rng([seed, step, sample])


def normals(rngs: Sequence[np.random.Generator], shape: Sequence[int]) -> Float[Tensor, "B *shape"]:
    """Unit normals, one sample's from each generator, on the CPU."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


def on(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; a GPU gets it in its turn, and nobody waits for that."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor  # else the copy waits for the steps before
    return pinned.to(device, non_blocking=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's initialisers and dropout draw from the global generators: seeds them, and gives them back as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that no step is half taken and no file half written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever reach the main thread
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def compiled(networks: Sequence[nn.Module], device: torch.device, on: bool) -> Iterator[None]:
    """Within the block the networks run through torch.compile; names and weights are as before."""
    for network in networks if on else ():
        network.compile(mode="reduce-overhead" if device.type == "cuda" else "default", dynamic=False)
    try:
        yield
    finally:
        for network in networks if on else ():
            network._compiled_call_impl = None  # there is no public way back
