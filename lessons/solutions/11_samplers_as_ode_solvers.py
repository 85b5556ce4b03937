"""Answers of lesson 11."""

import torch

from lessons.exercises import Exercise, difference
from minidiff.samplers import Level


def heun_step(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x + (then.sigma - now.sigma) * d_now, then)
    return x + (then.sigma - now.sigma) * (d_now + d_then) / 2


def check_heun_step(function) -> str | None:
    """From sigma 2 to sigma 1, on a curve whose slope depends on both x and sigma."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    now, then = Level(700, 0.2), Level(400, 0.5)

    def slope(x, level):
        return (x - torch.tanh(x / 2)) / level.sigma

    mistakes = {
        "uses the slope at the beginning alone, which is Euler's step: ask for one at its end too": with_one_slope(slope, x, now, then),
        "uses the slope at the end alone: halve the sum of both": with_the_last_slope(slope, x, now, then),
        "asks for the second slope at x, not at the point that the first one leads to": without_moving(slope, x, now, then),
        "asks for the second slope with the noise level of now: the point that the first one leads to lies at then": at_the_old_level(
            slope, x, now, then
        ),
        "adds up two slopes without halving: the step is twice too long": without_halving(slope, x, now, then),
        "sets off again from Euler's point: both slopes count from x": from_the_wrong_point(slope, x, now, then),
        "looks for the second slope on the wrong side: ask at x + (then.sigma - now.sigma) * d_now": on_the_wrong_side(slope, x, now, then),
        "walks up to more noise: sigma falls, so that the width of a step, then.sigma - now.sigma, is negative": upwards(
            slope, x, now, then
        ),
    }
    return difference(function(slope, x.clone(), now, then), heun_step(slope, x, now, then), mistakes)


def with_one_slope(slope, x, now, then):
    return x + (then.sigma - now.sigma) * slope(x, now)


def with_the_last_slope(slope, x, now, then):
    return x + (then.sigma - now.sigma) * slope(with_one_slope(slope, x, now, then), then)


def without_moving(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(x, then)) / 2


def at_the_old_level(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(with_one_slope(slope, x, now, then), now)) / 2


def without_halving(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(with_one_slope(slope, x, now, then), then))


def from_the_wrong_point(slope, x, now, then):
    moved = with_one_slope(slope, x, now, then)
    return moved + (then.sigma - now.sigma) * (slope(x, now) + slope(moved, then)) / 2


def on_the_wrong_side(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x - (then.sigma - now.sigma) * d_now, then)
    return x + (then.sigma - now.sigma) * (d_now + d_then) / 2


def upwards(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x + (now.sigma - then.sigma) * d_now, then)
    return x + (now.sigma - then.sigma) * (d_now + d_then) / 2


EXERCISES = (
    Exercise(
        heun_step,
        check_heun_step,
        wrong=(
            (with_one_slope, "which is Euler's step"),
            (with_the_last_slope, "the slope at the end alone"),
            (without_moving, "asks for the second slope at x"),
            (at_the_old_level, "with the noise level of now"),
            (without_halving, "without halving"),
            (from_the_wrong_point, "sets off again"),
            (on_the_wrong_side, "on the wrong side"),
            (upwards, "walks up"),
        ),
    ),
)
