"""How much memory a run will take, told before it begins.

    frozen weights     stand there already, as do the trained ones
    optimizer          AdamW keeps two float32 values a trained weight, Muon one
    average            one
    gradients          one
    activations        what a layer remembers on the way forward for the way back; grows with the batch

The activations are not guessed: the task's own loss is run forward and backward on tensors without contents (PyTorch's FakeTensorMode),
and every tensor's bytes are counted from its birth to its death. That takes no memory, and seconds rather than minutes.
What a kernel needs inside itself and what malloc keeps in reserve is not seen: on a CPU a share is added for it (RESERVE).
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.trainers import loop
from minidiff.trainers.checkpointing import checkpointed
from minidiff.trainers.optimizer import Muon
from minidiff.trainers.recipe import Settings

# A process grew by 1.24 times (the bundled model, batch 32) to 1.5 times (Stable Diffusion 1.x, LoRA) the bytes of its tensors; with
# checkpointing, where malloc gives memory back at once, by 1.3 and 1.1 times. On a GPU, PyTorch's own allocator gives out what is asked for, in steps of 512 bytes.
RESERVE = {("cpu", False): 1.3, ("cpu", True): 1.2}


@dataclass(frozen=True)
class Memory:
    """Bytes. activations: what the peak of a step holds beyond all the rest; at least what the optimizers need for a moment."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def above(self) -> int:
        """What training adds to a process, or a device, that holds the weights."""
        return self.gradients + self.optimizer + self.average + self.activations

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.above

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(getattr(self, name))}" for name in ("gradients", "optimizer", "average", "activations"))
        weights = f"weights {readable(self.frozen + self.trained)}, of which {readable(self.trained)} are trained"
        return f"about {readable(self.total)} of memory: {weights}; training adds {readable(self.above)} ({parts})"


def estimate_memory(task: loop.Task, settings: Settings, device: torch.device) -> Memory:
    """What the run of this task takes. The task is left as it was, but that its weights lose gradients they had."""
    networks = loop.networks_of(task)
    weights = {p for module in (*task.modules.values(), *networks) for p in module.parameters()}
    trained = [p for p in weights if p.requires_grad]
    for p in weights:
        p.grad = None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, checkpointed(networks, settings.checkpointing):
            loop.loss_of(task, 0, range(settings.batch), settings, device).backward()
    finally:
        for p in weights:
            p.grad = None
    gradients = bytes_of(trained)
    # While the optimizers step, the activations are gone. On a GPU AdamW works on all weights at once and makes a copy of them.
    stepping = gradients if device.type == "cuda" else 2 * max(map(bytes_of, ([p] for p in trained)))
    reserve = RESERVE.get((device.type, settings.checkpointing), 1.0)
    slots = sum(bytes_of(moved(o)) * (1 if isinstance(o, Muon) else 2) for o in task.optimizers(settings))
    return Memory(
        frozen=bytes_of(p for p in weights if not p.requires_grad),
        trained=bytes_of(trained),
        gradients=gradients,
        optimizer=slots,
        average=gradients * sum(decay is not None for decay in (settings.average, settings.slow_average)),
        activations=round(reserve * max(live.peak, gradients + stepping)) - gradients,
    )


def moved(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def readable(count: int) -> str:
    """Bytes as 1.2 GB or 34 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of the tensors that are made and still alive: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view of a weight has no bytes of its own
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.live -= count
