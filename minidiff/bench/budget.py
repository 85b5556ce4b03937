"""The time that a benchmark may take: handed down from the whole run to its stages, and from a stage to each answer it waits for."""

import math
from time import monotonic


class Budget:
    """A span of seconds that began when it was made; without a number it never ends."""

    def __init__(self, seconds: float = math.inf):
        self.end = monotonic() + seconds

    @property
    def left(self) -> float:
        """Return the seconds that are left, 0 at least."""
        return max(0.0, self.end - monotonic())

    def part(self, share: float) -> "Budget":
        """Return a budget of a share, 0..1, of what is left now."""
        return Budget(share * self.left)
