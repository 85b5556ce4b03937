"""Answers of lesson 14."""

import torch

from lessons.exercises import Exercise, difference


def low_rank(x, down, up, alpha):
    return alpha / down.shape[0] * (x @ down.T @ up.T)


def check_low_rank(function) -> str | None:
    """Of a layer that is not square, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (4, 8), (6, 4)))
    arguments = (x, down, up, 2.0)
    mistakes = {
        "leaves out the scale alpha / r, here 2 / 4: the change is twice as large as it was trained to be": unscaled(*arguments),
        "multiplies by alpha, but not by 1 / r: r is the number of rows of down, here 4": scaled_by_alpha(*arguments),
        "divides by 8, the width of the input: r is the number of rows of down, here 4": divided_by_width(*arguments),
        "gives shape [2, 5, 4], x after down alone: the r numbers have to go through up to the 6 outputs": without_up(*arguments),
    }
    return difference(function(*arguments), low_rank(*arguments), mistakes)


def unscaled(x, down, up, alpha):
    return x @ down.T @ up.T


def scaled_by_alpha(x, down, up, alpha):
    return alpha * (x @ down.T @ up.T)


def divided_by_width(x, down, up, alpha):
    return alpha / down.shape[1] * (x @ down.T @ up.T)


def without_up(x, down, up, alpha):
    return alpha / down.shape[0] * (x @ down.T)


EXERCISES = (
    Exercise(
        low_rank,
        check_low_rank,
        wrong=(
            (unscaled, "leaves out the scale"),
            (scaled_by_alpha, "but not by 1 / r"),
            (divided_by_width, "divides by 8"),
            (without_up, "x after down alone"),
        ),
    ),
)
