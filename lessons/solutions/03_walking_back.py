"""Answers of lesson 03."""

import torch

from lessons.exercises import Exercise, difference


def ddim_step(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def check_ddim_step(function) -> str | None:
    """In the middle of the walk, and at its start, where alpha_bar is 0."""
    generator = torch.Generator().manual_seed(0)
    x_t, x0_hat = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    alpha_bar = torch.linspace(0.99, 0.0, 10)
    arguments = (alpha_bar, x_t, x0_hat, 6, 2)
    mistakes = {
        "puts back as much noise as it took out, which ends at x_t again: the second line wants alpha_bar[then] in both places": unmoved(
            *arguments
        ),
        "scales x_t itself instead of the noise in it: take sqrt(alpha_bar[now]) x0_hat off x_t, and divide by sqrt(1 - alpha_bar[now])": not_separated(
            *arguments
        ),
        "does not divide by sqrt(1 - alpha_bar[now]), so that eps_hat is too small, its variance not 1": undivided(*arguments),
        "mixes by alpha_bar and 1 - alpha_bar without their square roots": without_roots(*arguments),
        "gives the picture alone, with no noise put back: x0_hat is only a guess, too rough to keep": without_noise(*arguments),
        "swaps the timesteps: eps_hat is taken out of x_t at now, and put back at then": swapped(*arguments),
    }
    start = (alpha_bar, x_t, x0_hat, 9, 7)
    return difference(function(*arguments), ddim_step(*arguments), mistakes) or difference(
        function(*start), ddim_step(*start), of="from alpha_bar[now] = 0"
    )


def unmoved(alpha_bar, x_t, x0_hat, now, then):
    return x_t.clone()


def not_separated(alpha_bar, x_t, x0_hat, now, then):
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * x_t


def undivided(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = x_t - alpha_bar[now].sqrt() * x0_hat
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def without_roots(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now] * x0_hat) / (1 - alpha_bar[now])
    return alpha_bar[then] * x0_hat + (1 - alpha_bar[then]) * eps_hat


def without_noise(alpha_bar, x_t, x0_hat, now, then):
    return alpha_bar[then].sqrt() * x0_hat


def swapped(alpha_bar, x_t, x0_hat, now, then):
    return ddim_step(alpha_bar, x_t, x0_hat, then, now)


EXERCISES = (
    Exercise(
        ddim_step,
        check_ddim_step,
        wrong=(
            (unmoved, "ends at x_t again"),
            (not_separated, "scales x_t itself"),
            (undivided, "does not divide"),
            (without_roots, "without their square roots"),
            (without_noise, "the picture alone"),
            (swapped, "swaps the timesteps"),
        ),
    ),
)
