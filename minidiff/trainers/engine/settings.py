"""The numbers of a training run; importing them costs nothing, so that the command line can show them at once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from minidiff.config import check_choice

Schedule = Literal["constant", "linear", "cosine", "linear_after_hold"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast the loop (loop.py) trains, whatever it trains. Raises ValueError for what cannot be done.

    Args:
        steps: how many steps
        batch: samples at once, in each process; a step sees batch * gradient_accumulation * processes of them
        learning_rate: of the optimizer AdamW
        gradient_accumulation: batches whose gradients are added up for a step
        warmup_steps: steps over which the learning rate rises from 0
        schedule: of the learning rate after that; see optimizer.learning_rate
        max_grad_norm: the largest norm of the whole gradient; inf (None in Python) leaves it as it is
        ema_decay: decay of a running mean of the weights, which is then the result, as 0.99; none by default
        precision: of products and convolutions; auto is bfloat16 on a GPU, float32 elsewhere; what is trained stays in float32
        checkpointing: compute what is inside a block twice: less memory, a third slower
        compile: run the networks through torch.compile (CUDA graphs on a GPU, unless gradients accumulate); it takes a minute before the
            first step
        seed: of everything that is random
        save_every: steps between two saves of the state
    """

    steps: int
    batch: int
    learning_rate: float
    gradient_accumulation: int = 1
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    precision: Precision = "auto"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch", "gradient_accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: training needs at least 1")
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: it cannot be below 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate}: nothing is learned at it; give a number above 0, such as 1e-4")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm {self.max_grad_norm}: the gradient's largest norm must be above 0; None leaves gradients as they are"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay} is outside 0..1 (1 left out); None keeps no average")
        for name, choices in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            check_choice(name, getattr(self, name), choices)
        if self.compile and self.checkpointing:
            raise ValueError("compile and checkpointing do not go together; choose one")
