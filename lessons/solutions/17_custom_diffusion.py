"""Answers of lesson 17."""

import torch

from lessons.exercises import Exercise, difference


def merge(W0, C, V, C_reg):
    d = torch.linalg.solve(C_reg.T @ C_reg, C.T).T
    v = torch.linalg.solve(d @ C.T, V - C @ W0.T)
    return W0 + v.T @ d


def check_merge(function) -> str | None:
    """Two constraints on a map of 5 channels, and 9 rows to be kept, in which the channels differ in size."""
    generator = torch.Generator().manual_seed(0)
    W0, C, V, C_reg = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (2, 5), (2, 3), (9, 5)))
    C_reg = C_reg * torch.tensor([3.0, 1.0, 0.3, 1.0, 2.0])
    arguments = (W0, C, V, C_reg)
    mistakes = {
        "gives the change alone: add it to W0": change_alone(*arguments),
        "asks the change for V itself: what W0 gives already, C @ W0.T, has to be subtracted from V first": all_of_v(*arguments),
        "leaves C_reg out, d = C: the smallest change, not the one that moves the rows of C_reg least": without_c_reg(*arguments),
        "multiplies by C_reg^T C_reg instead of its inverse, so that it moves most where it should move least": not_inverted(*arguments),
        "leaves out (d C^T)^-1, so that W C^T is not V: solve with d @ C.T": without_the_second_solve(*arguments),
    }
    return difference(function(*arguments), merge(*arguments), mistakes, tolerance=1e-3)  # two systems are solved in float32


def change_alone(W0, C, V, C_reg):
    return merge(W0, C, V, C_reg) - W0


def all_of_v(W0, C, V, C_reg):
    d = torch.linalg.solve(C_reg.T @ C_reg, C.T).T
    return W0 + torch.linalg.solve(d @ C.T, V).T @ d


def without_c_reg(W0, C, V, C_reg):
    return W0 + torch.linalg.solve(C @ C.T, V - C @ W0.T).T @ C


def not_inverted(W0, C, V, C_reg):
    d = C @ C_reg.T @ C_reg
    return W0 + torch.linalg.solve(d @ C.T, V - C @ W0.T).T @ d


def without_the_second_solve(W0, C, V, C_reg):
    d = torch.linalg.solve(C_reg.T @ C_reg, C.T).T
    return W0 + (V - C @ W0.T).T @ d


EXERCISES = (
    Exercise(
        merge,
        check_merge,
        wrong=(
            (change_alone, "the change alone"),
            (all_of_v, "asks the change for V itself"),
            (without_c_reg, "leaves C_reg out"),
            (not_inverted, "instead of its inverse"),
            (without_the_second_solve, "leaves out (d C^T)^-1"),
        ),
    ),
)
