"""The training loop: one for every method, and for training from scratch.

    task.loss(step, sample_ids) -> gradients -> mean over processes -> clip -> optimizers -> EMA -> TrainStep
         the method                                                                     every so often: the state file

A Task says what is trained and what the loss of a sample is; the loop says how. All randomness of a task comes from
rng_for(seed, step, sample). So a sample is the same whether its batch is made at once, by accumulation or by several processes, and a run
that is stopped and resumed from its state ends, on a CPU, with the very same weights.

Steps are numbered from 0, and so are `step` of a loss and of the learning rate; `done` is how many of them are over.
"""

import dataclasses
import math
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.files import check_same
from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.ema import EMA
from minidiff.trainers.engine.gradient_checkpointing import thrifty_malloc, with_checkpointing
from minidiff.trainers.engine.optimizer import learning_rate
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.engine.state import read_state, write_state

# Settings that change a run by rounding, or not at all.
ONLY_HOW = ("batch", "gradient_accumulation", "checkpointing", "compile", "save_every")


@runtime_checkable
class Task(Protocol):
    """What is trained.

    modules: their parameters that require a gradient are trained; the state file names them so. All float32.
    loss: the mean over the samples of these numbers in the step's whole batch, each with the random numbers of rng_for(seed, step, number).
        It may not keep tensors for later calls, nor look at values on the device (`.item()`, `if (x > 0).any()`): the loop would wait.

    A task may also have
    networks: tuple of the modules that the loss runs through, if more than `modules`: those that checkpointing and compile mean.
    resident: tuple of the modules that are on the device during the run, whether the loss runs through them or not, as a VAE whose latents
        are cached and which the sheets of pictures need. The estimate of memory counts them.
    about: flat dict of numbers and strings that identifies the run, as its phase, a hash of its data and its data options. It is written
        into the state, and must be equal for a run to resume from there.
    """

    modules: dict[str, nn.Module]

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]: ...

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class TrainStep:
    """A step that was taken.

    Args:
        done: how many steps are over with this one, 1 after the first
        steps: how many there are in all
        loss: mean over the step's samples, on the device (float() waits for it)
        lr: learning rate of the step
    """

    done: int
    steps: int
    loss: Float[Tensor, ""]
    lr: float


def train(task: Task, settings: Settings, device: torch.device, state: Path | None = None) -> Iterator[TrainStep]:
    """Take the steps of a run that are left, one an iteration; see Training.

    Args:
        task: what is trained
        settings: of the loop
        device: where the task is
        state: file to save to and resume from; None saves nothing
    """
    return Training(task, settings, device, state).run()


class Training:
    """A run: the task's weights, their optimizers, an EMA per module if asked for, and how many steps are done.

    state: a file to resume from, if it is there, and to save to. Raises ValueError if it belongs to another run, naming what differs.
    """

    def __init__(self, task: Task, settings: Settings, device: torch.device, state: Path | None = None):
        self.task, self.settings, self.device, self.state = task, settings, device, state
        self.done = 0
        if device.type == "cuda" and half_precision(settings.precision, device) is not None:
            for network in networks_of(task):  # the layout of a GPU's 16-bit convolutions, and the one our GroupNorm kernel takes
                network.to(memory_format=torch.channels_last)
        self.weights = trainable_weights(task.modules)
        self.optimizers = task.optimizers(settings)
        decay = settings.ema_decay
        self.ema = {} if decay is None else {name: EMA(module, decay) for name, module in task.modules.items()}
        self.losses = LossWatch()
        self.extended = False  # whether it goes on from a run of fewer steps, all of which were taken
        self.scaler = torch.amp.GradScaler(device.type, enabled=half_precision(settings.precision, device) == torch.float16)
        if state is not None and state.exists():
            self.load_state_dict(read_state(state))
        self.saved = self.done
        if not distributed.all_equal(self.done, device):
            raise ValueError(f"the processes begin at different steps, this one at {self.done}: all need the same {state}")
        self.ddp = distributed.data_parallel(self.weights.values())

    def run(self) -> Iterator[TrainStep]:
        """Take the steps that are left, one an iteration. Stopped between two steps or in one, it saves the last whole step."""
        settings = self.settings
        thrifty = settings.checkpointing and self.device.type == "cpu"
        with with_compile(networks_of(self.task), self.device, settings), thrifty_malloc(thrifty):
            try:
                while self.done < settings.steps:
                    lr = learning_rate(self.done, settings)
                    loss = self._gradients()
                    self.losses.add(self.done + 1, loss, lr)
                    with uninterrupted():
                        self._update(lr)
                    if self.done % settings.save_every == 0 or self.done == settings.steps:
                        self.save()
                    yield TrainStep(self.done, settings.steps, loss, lr)
            except (KeyboardInterrupt, GeneratorExit):
                self.save()
                raise

    def _gradients(self) -> Float[Tensor, ""]:
        """Compute the gradient of the mean loss over the whole batch, in every weight's .grad, and return that loss."""
        settings, loss = self.settings, torch.zeros((), device=self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for number, sample_ids in enumerate(microbatches(settings), start=1):
            if settings.compile:
                torch.compiler.cudagraph_mark_step_begin()  # what the graphs gave out before may be overwritten
            with with_checkpointing(networks_of(self.task), settings.checkpointing):
                part = compute_loss(self.task, self.done, sample_ids, settings, self.device) / settings.gradient_accumulation
                distributed.backward(self.scaler.scale(part), self.ddp, last=number == settings.gradient_accumulation)
            loss += part.detach()
        return distributed.mean(loss)

    def _update(self, lr: float) -> None:
        """Clip the gradients and take the step."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.weights.values(), self.settings.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            self.scaler.step(optimizer)  # with float16 a step whose gradient overflowed is left out
        self.scaler.update()
        for name, ema in self.ema.items():
            ema.update(self.task.modules[name])
        self.done += 1

    def save(self) -> None:
        """Write the state, if there is a new one and a file to write to."""
        self.losses.check(wait=True)
        if self.state is None or self.done == self.saved or distributed.rank() > 0:
            return
        for name, p in self.weights.items():
            if not p.isfinite().all():
                raise ValueError(
                    f"{name} is not finite after step {self.done}, the state of step {self.saved} is kept: lower the learning rate"
                )
        with uninterrupted():
            self.saved = self.done  # also if writing fails: it is not tried again on the way out
            write_state(self.state, self.state_dict())

    def state_dict(self) -> dict:
        """Return all that a run needs to resume: tensors, numbers, lists and dicts only, to be read back without running code."""
        return {
            "i": self.done,
            "asked": self._asked(),
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": {name: ema.state_dict() for name, ema in self.ema.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state; a finished run may be given more steps. Raises ValueError if it belongs to another run."""
        asked, found = self._asked(), dict(state["asked"])
        longer = found | {"steps": asked["steps"]}
        if found.get("steps") == state["i"] < asked["steps"] and longer == asked:
            found, self.extended = longer, True
            if self.settings.schedule != "constant":
                warnings.warn(f"the learning rate goes on as in a run of {asked['steps']} steps, not from where it ended", stacklevel=2)
        check_same(self.state or Path("the state"), found, asked)
        self.done = state["i"]
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, ema in self.ema.items():
            ema.load_state_dict(state["ema"][name])
        self.scaler.load_state_dict(state["scaler"])

    def _asked(self) -> dict:
        """Identify a run by its settings, its task and the shapes of its weights."""
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in ONLY_HOW}
        weights = {name: "x".join(map(str, p.shape)) for name, p in self.weights.items()}
        samples = self.settings.batch * self.settings.gradient_accumulation * distributed.world_size()
        return settings | {"samples a step": samples} | getattr(self.task, "about", {}) | weights


class LossWatch:
    """Stop at the first loss that is not finite, from which on nothing is learned; on a GPU a few steps later, without waiting."""

    def __init__(self):
        self.waiting: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: Float[Tensor, ""], lr: float) -> None:
        """Look at the loss of a step, counted from 1, and of those before that the GPU is done with. Raises like `check`."""
        event, copy = None, loss.detach()
        if copy.device.type == "cuda":
            copy = torch.empty((), dtype=copy.dtype, pin_memory=True).copy_(copy, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, lr, copy, event))
        self.check()

    def check(self, wait: bool = False) -> None:
        """Look at the losses that are there; `wait`: at all. Raises ValueError, naming the step, for one that is not finite."""
        while self.waiting and (wait or self.waiting[0][3] is None or self.waiting[0][3].query()):
            step, lr, loss, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            if not math.isfinite(value := float(loss)):
                self.waiting.clear()
                lost = f"the loss is {value} at step {step}: nothing is learned from there on"
                raise ValueError(f"{lost}; what was saved before is kept; lower the learning rate ({lr:g})")


def trainable_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by module and name. Raises ValueError if there is none, or one is not float32."""
    weights = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError(f"nothing in {', '.join(modules) or 'no module'} requires a gradient: there is nothing to train")
    for name, p in weights.items():
        if p.dtype != torch.float32:
            raise ValueError(f"{name} is {p.dtype}: what is trained must be float32, or small steps are rounded away")
    return weights


def networks_of(task: Task) -> tuple[nn.Module, ...]:
    """Return the modules that the task's loss runs through."""
    return getattr(task, "networks", None) or tuple(task.modules.values())


def microbatches(settings: Settings) -> Iterator[range]:
    """Yield this process's sample ids of a step, settings.batch at a time."""
    first = distributed.rank() * settings.gradient_accumulation
    for k in range(first, first + settings.gradient_accumulation):
        yield range(k * settings.batch, (k + 1) * settings.batch)


def compute_loss(task: Task, step: int, sample_ids: range, settings: Settings, device: torch.device) -> Float[Tensor, ""]:
    """Return the task's loss in the precision asked for. PyTorch's own generators, which dropout draws from, are seeded and restored.

    Args:
        task: what is trained
        step: from 0
        sample_ids: numbers of the samples within the step
        settings: seed and precision are read
        device: where the loss is computed
    """
    half = half_precision(settings.precision, device)
    with with_seed(int(rng_for(settings.seed, step, sample_ids.start).integers(2**62)), device):
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            return task.loss(step, sample_ids)


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit dtype to compute in, or None for float32."""
    if precision == "auto":
        # GPUs before Ampere only emulate bfloat16, more slowly than they compute in float16.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "float32" if device.type != "cuda" else "bfloat16" if native else "float16"
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def rng_for(seed: int, step: int, sample: int) -> np.random.Generator:
    """Return the random generator for one sample of one step, its only source of randomness."""
    return np.random.default_rng([seed, step, sample])


def randn_per_sample(rngs: Sequence[np.random.Generator], shape: Sequence[int]) -> Float[Tensor, "B *shape"]:
    """Draw unit normals, one sample from each generator, on the CPU."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


@contextmanager
def with_seed(seed: int, device: torch.device = torch.device("cpu")) -> Iterator[None]:
    """Seed PyTorch's global generators, which initialisers and dropout draw from, within the block; restore the CPU's and the device's."""
    # Of no GPU but this one: PyTorch would otherwise copy the states of all of them in every step, and warn where there are several.
    with torch.random.fork_rng([device] if device.type == "cuda" and torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done, so that no step is half taken and no file half written."""
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
def with_compile(networks: Sequence[nn.Module], device: torch.device, settings: Settings) -> Iterator[None]:
    """Run the networks through torch.compile within the block, if settings ask for it; names and weights are unchanged.

    On a GPU its kernels are launched as CUDA graphs, unless gradients accumulate: a gradient may lie in the memory of a graph, which the
    next micro-batch overwrites. PyTorch then stops with an error or adds up wrong numbers.
    """
    graphs = device.type == "cuda" and settings.gradient_accumulation == 1
    for network in networks if settings.compile else ():
        network.compile(mode="reduce-overhead" if graphs else "default", dynamic=False)
    try:
        yield
    finally:
        for network in networks if settings.compile else ():
            network._compiled_call_impl = None  # there is no public way back
