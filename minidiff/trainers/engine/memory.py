"""How much memory a run will take, estimated before it begins.

    weights            of all that is on the device, whether a step runs it or not: in memory already
    optimizer          AdamW keeps two float32 values per trained weight, Muon one
    ema                one
    gradients          one
    activations        what a layer keeps of the forward pass for the backward pass; grows with the batch

The activations are not guessed: the task's own loss is run forward and backward on tensors without contents (PyTorch's FakeTensorMode),
and every tensor's bytes are counted from its birth to its death. That takes no memory, and seconds rather than minutes.
What a kernel needs inside itself and what malloc keeps in reserve is not seen: on a CPU a share is added for it (RESERVE).
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.markdown import format_bytes
from minidiff.trainers.engine import loop
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from minidiff.trainers.engine.optimizer import Muon
from minidiff.trainers.engine.settings import Settings

# A process grew by 1.24 times (the bundled model, batch 32) to 1.5 times (Stable Diffusion 1.x, LoRA) the bytes of its tensors; with
# checkpointing, where malloc gives memory back at once, by 1.3 and 1.1 times. On a GPU, PyTorch's own allocator gives out what is asked
# for, in steps of 512 bytes.
RESERVE = {("cpu", False): 1.3, ("cpu", True): 1.2}


@dataclass(frozen=True)
class Memory:
    """Bytes. activations: what the peak of a step holds beyond all the rest; at least what the optimizers need for a moment."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def above(self) -> int:
        """Return what training adds to a process, or a device, that holds the weights."""
        return self.gradients + self.optimizer + self.ema + self.activations

    @property
    def total(self) -> int:
        """Return the bytes of weights and training together."""
        return self.frozen + self.trained + self.above

    def __str__(self) -> str:
        optimizer = format_bytes(self.gradients + self.optimizer + self.ema)
        weights, activations = format_bytes(self.frozen + self.trained), format_bytes(self.activations)
        return f"about {format_bytes(self.total)} of memory: weights {weights}, optimizer {optimizer}, activations {activations}"


def estimate_memory(task: loop.Task, settings: Settings, device: torch.device) -> Memory:
    """Estimate what the run of this task takes. The task is left as it was, but that its weights lose gradients they had."""
    networks = loop.networks_of(task)
    weights = {p for module in (*task.modules.values(), *networks, *getattr(task, "resident", ())) for p in module.parameters()}
    trained = {p for module in task.modules.values() for p in module.parameters() if p.requires_grad}
    for p in weights:
        p.grad = None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, with_checkpointing(networks, settings.checkpointing):
            loop.compute_loss(task, 0, range(settings.batch), settings, device).backward()
    finally:
        for p in weights:
            p.grad = None
    gradients = bytes_of(trained)
    # While the optimizers step, the activations are gone. On a GPU AdamW works on all weights at once and makes a copy of them.
    stepping = gradients if device.type == "cuda" else 2 * max(map(bytes_of, ([p] for p in trained)))
    reserve = RESERVE.get((device.type, settings.checkpointing), 1.0)
    groups = [
        (1 if isinstance(optimizer, Muon) else 2, group) for optimizer in task.optimizers(settings) for group in optimizer.param_groups
    ]
    return Memory(
        frozen=bytes_of(weights - trained),
        trained=bytes_of(trained),
        gradients=gradients,
        optimizer=sum(slots * bytes_of(group["params"]) for slots, group in groups),
        ema=0 if settings.ema_decay is None else gradients,
        activations=round(reserve * max(live.peak, gradients + stepping)) - gradients,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the size of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made within the block and still alive: `live` now, `peak` at most."""

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
