"""How weights change: the two optimizers, the learning rate over the steps, and the EMA of the weights.

The training methods use AdamW (Loshchilov and Hutter 2019) throughout. Training from scratch uses Muon for matrices and convolutions,
AdamW for the rest.

Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable for LLM training") takes the momentum of a weight matrix, replaces it by
the nearest matrix whose singular values are all about 1, and steps that way: rare directions learn as fast as common ones. With Liu
et al.'s factor its steps are as large as AdamW's, so that one learning rate serves both.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.trainers.engine.settings import Settings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at 0, singular values end between 0.7 and 1.2


def orthogonalise(matrix: Float[Tensor, "R C"], steps: int = 5) -> Float[Tensor, "R C"]:
    """Return the matrix with the same singular vectors and all singular values near 1.

    By the quintic Newton-Schulz iteration x <- (a + b x x' + c (x x')^2) x.
    Every factor is a polynomial in x x', so the product of them is worked out on that small square matrix and applied to x once.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T, steps).T
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)  # the iteration needs singular values of at most 1
    gram = x @ x.T
    identity = product = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon, for weights of two or more dimensions (a convolution is its matrix C_out x C_in*kh*kw), with Nesterov momentum."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure here
        """Change every weight that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                scale = 0.2 * math.sqrt(max(update.shape))  # Liu et al. eq. 4: root mean square of the step 0.2, AdamW's
                p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * scale)


def optimizers(modules: Iterable[nn.Module], lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Return Muon over the hidden matrices and convolutions, AdamW over embeddings, biases and norms."""
    matrices, others = [], []
    for module in modules:
        for part in module.modules():
            for p in part.parameters(recurse=False):
                hidden = isinstance(part, nn.Linear | nn.Conv2d) and p.ndim > 1
                (matrices if hidden else others).append(p)
    return Muon(matrices, lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0)


def adamw(params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with the numbers that the public trainers of Stable Diffusion share. params: weights, or groups of them.

    A group {"params": [...], "scale": 0.1} learns at a tenth of the learning rate.
    """
    return torch.optim.AdamW(params, settings.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)


def learning_rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step, counted from 0: it rises linearly over `warmup_steps` steps, then follows the schedule.

    constant            stays
    linear              falls in a line to 0
    cosine              falls to 0 as half a cosine (Loshchilov and Hutter 2017, without restarts)
    linear_after_hold   stays for a quarter of all steps, then falls in a line to 5 %
    """
    warmup_steps, steps = settings.warmup_steps, settings.steps
    rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    left = min(1.0, (steps - step) / max(1, steps - warmup_steps))
    falling = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        "linear_after_hold": max(0.05, (steps - step) / (0.75 * steps)),
    }
    return settings.learning_rate * min(rising, falling[settings.schedule])
