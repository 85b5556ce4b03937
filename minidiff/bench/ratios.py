"""Ratios of times from interleaved rounds: the median of the rounds' ratios, with a bootstrap interval.

    round 1: b 2.0 s, a 1.0 s, c ...      random order in each round      ratios b / a of a round: 2.0, 2.1, 1.9, ...
    round 2: a 1.1 s, c ..., b 2.3 s                                          their median, and how far it would move in other rounds

Whatever slows a machine for a while (heat, neighbours) slows a whole round, so the ratio of two times of one round is steadier than that of
their medians over all rounds. Interval: Efron 1979, "Bootstrap methods: another look at the jackknife", the percentile method.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000  # of rounds, for the interval
SHARE = 0.95  # of the draws lie in the interval


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and the interval that holds it in 95 % of the bootstrap samples."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Return theirs / ours, round by round: 2 is twice as fast. Raises ValueError for no rounds, or rounds that do not pair up."""
    if not ours or len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} and {len(ours)} rounds: ratios need the same rounds of both, at least one")
    ratios = np.asarray(theirs, dtype=np.float64) / np.asarray(ours, dtype=np.float64)
    drawn = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def turns(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (round, name): every name once per round, in a random order."""
    rng = np.random.default_rng(seed)
    for i in range(rounds):
        for name in rng.permutation(list(names)):
            yield i, str(name)
