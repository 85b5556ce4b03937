"""The numbers of a training run; importing them costs nothing, so that the command line can show them at once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine", "flat_then_linear"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop (loop.py) trains, whatever it trains. Raises ValueError for what cannot be done.

    batch: samples at once, in each process; a step sees batch * accumulate * processes of them.
    schedule: of the learning rate after `warm_up` steps, see optimizer.learning_rate.
    clip: the largest norm of the whole gradient; None leaves it as it is.
    average: decay of the running mean of the weights; None keeps none.
    precision: of matrix products and convolutions; what is trained stays in float32. "auto" is bfloat16 on a GPU, float32 elsewhere.
    checkpointing: forget what is inside a block on the way forward and work it out again on the way back: less memory, a third slower.
    compile: run the networks through torch.compile (CUDA graphs on a GPU); it takes a minute before the first step.
    save_every: steps between two saves of the state.
    """

    steps: int
    batch: int
    learning_rate: float
    accumulate: int = 1
    warm_up: int = 0
    schedule: Schedule = "constant"
    clip: float | None = 1.0
    average: float | None = None
    precision: Precision = "auto"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: training needs at least 1")
        for name in ("warm_up", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: it cannot be below 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate}: nothing is learnt at it; give a number above 0, such as 1e-4")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip {self.clip}: the gradient's largest norm must be above 0; None leaves gradients as they are")
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average {self.average} is outside 0..1 (1 left out); None keeps no average")
        for name, choices in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} unknown; choose {', '.join(choices)}")
        if self.compile and self.checkpointing:
            raise ValueError("compile and checkpointing do not go together; choose one")
