"""Answers of lesson 01."""

import torch

from lessons.exercises import Exercise, difference


def q_sample(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def check_q_sample(function) -> str | None:
    """On a batch as large as a picture is wide, where factors of the wrong shape would go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 3, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0, 2, 5, 9])
    alpha_bar = torch.linspace(0.99, 0.02, 10)
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    across = alpha_bar[t]
    mistakes = {
        "mixes by alpha_bar and 1 - alpha_bar themselves, so the variance does not stay 1: take the square root of each": a * x_0
        + (1 - a) * eps,
        "gives the picture the factor of the noise and the noise the picture's: alpha_bar is near 1 at t = 0, where x_t is almost x_0": (
            (1 - a).sqrt() * x_0 + a.sqrt() * eps
        ),
        "takes alpha_bar[t] in shape [4] along the width of the picture, not along the batch: reshape it to [4, 1, 1, 1]": (
            across.sqrt() * x_0 + (1 - across).sqrt() * eps
        ),
        "gives the noise the factor 1 - sqrt(alpha_bar), which is not sqrt(1 - alpha_bar)": a.sqrt() * x_0 + (1 - a.sqrt()) * eps,
    }
    return difference(function(alpha_bar, x_0, t, eps), q_sample(alpha_bar, x_0, t, eps), mistakes)


def without_roots(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a * x_0 + (1 - a) * eps


def swapped(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (1 - a).sqrt() * x_0 + a.sqrt() * eps


def along_the_width(alpha_bar, x_0, t, eps):
    return alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * eps


def root_of_the_wrong_thing(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a.sqrt()) * eps


EXERCISES = (
    Exercise(
        q_sample,
        check_q_sample,
        wrong=(
            (without_roots, "square root of each"),
            (swapped, "the factor of the noise"),
            (along_the_width, "along the width"),
            (root_of_the_wrong_thing, "not sqrt(1 - alpha_bar)"),
        ),
    ),
)
