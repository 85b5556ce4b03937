"""Dropout that is drawn for each sample by itself, so that a batch made in parts, or by several processes, gives the same as at once.

    u = hash(row's seed, layer's number, place in the row)      0 where u < p, else x / (1 - p)

The hash is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; here splitmix64 of Steele et al. 2014): it
has no state, so that gradient checkpointing, which runs a layer twice, gets the same mask both times.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, 2^64 / golden ratio, and its two multipliers
MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class SampleDropout(nn.Module):
    """Dropout with a seed for each row of the batch, given by `set_row_seeds`; before that, from PyTorch's global generator.

    Args:
        p: probability that a number is left out, in training mode
    """

    def __init__(self, p: float):
        super().__init__()
        self.p, self.number = p, 0
        self.seeds: Tensor | None = None

    def forward(self, x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Return the input with some numbers left out, and the others larger for it."""
        if not self.training or self.p == 0:
            return x
        if self.seeds is None or len(self.seeds) != len(x):
            return F.dropout(x, self.p)
        return x * (uniform(self.seeds, self.number, x[0].numel()).view(x.shape) >= self.p) / (1 - self.p)


def set_row_seeds(module: nn.Module, seeds: Int[Tensor, " B"] | None) -> None:
    """Give all dropout in a module the seeds of the rows to come, one for each sample; None takes them away."""
    for number, layer in enumerate(layer for layer in module.modules() if isinstance(layer, SampleDropout)):
        layer.seeds, layer.number = seeds, number


def uniform(seeds: Int[Tensor, " B"], stream: int, count: int) -> Float[Tensor, "B count"]:
    """Return numbers in [0, 1), `count` for each seed, a function of seed and stream alone."""
    start = _mix(seeds + _signed(GAMMA * (stream + 1)))
    places = torch.arange(1, count + 1, device=seeds.device) * _signed(GAMMA)
    return (_shift_right(_mix(start[:, None] + places), 40)).float() / 2**24


def _mix(x: Int[Tensor, "*dims"]) -> Int[Tensor, "*dims"]:
    """Return splitmix64's finaliser of each number; products wrap around."""
    for shift, factor in MULTIPLIERS:
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift copies the sign


def _signed(number: int) -> int:
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
