"""The exponential moving average (EMA) of the weights, which samples better than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The exponential moving average of the weights that are trained, which samples better than they: mean <- d mean + (1 - d) weights.

    d rises with the steps, (1 + n) / (10 + n), up to `decay`, so that the first, bad weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.steps = 0
        self.mean = {name: p.detach().clone() for name, p in _trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module):
        """Move the mean towards the weights after a step."""
        d = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(  # type: ignore[attr-defined]  # one kernel for all weights has no public name
            list(self.mean.values()), [p for _, p in _trainable(module)], 1 - d
        )

    def copy_to(self, module: nn.Module) -> None:
        """Replace the module's trained weights by the averaged ones."""
        _copy(self.mean, module)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Let the module hold the averaged weights within the block, to be looked at, saved or copied."""
        own = {name: p.detach().clone() for name, p in _trainable(module)}
        try:
            self.copy_to(module)
            yield
        finally:
            _copy(own, module)

    def state_dict(self) -> dict:
        """Return what a run needs to resume."""
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state: dict):
        """Resume from a state."""
        self.steps = state["steps"]
        for name, value in state["mean"].items():
            self.mean[name].copy_(value)


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@torch.no_grad()
def _copy(values: dict[str, Tensor], module: nn.Module):
    for name, p in _trainable(module):
        p.copy_(values[name])
