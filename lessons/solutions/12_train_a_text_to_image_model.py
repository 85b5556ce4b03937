"""Answers of lesson 12."""

import torch

from lessons.exercises import Exercise, difference

DECAY = 0.95


def ema_update(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return d * mean + (1 - d) * weight


def check_ema_update(function) -> str | None:
    """Late, where the decay has been reached, and early, where it has not."""
    generator = torch.Generator().manual_seed(0)
    for n in (500, 2):
        mean, weight = (torch.randn(3, 4, generator=generator) for _ in range(2))
        mistakes = {
            "gives the old mean the share 1 - d and the new weight the share d: the mean is to stay nearly as it is, so it gets d": (
                exchanged(mean, weight, DECAY, n)
            ),
            "takes the decay as it is from the first step on: d has to rise, min(decay, (1 + n) / (10 + n))": without_a_rise(
                mean, weight, DECAY, n
            ),
            "takes the larger of the two numbers, so that d never stops at the decay: take min(decay, (1 + n) / (10 + n))": (
                the_larger(mean, weight, DECAY, n)
            ),
        }
        wrong = difference(function(mean, weight, DECAY, n), ema_update(mean, weight, DECAY, n), mistakes, of=f"at n = {n}")
        if wrong is not None:
            return wrong
    return None


def exchanged(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return (1 - d) * mean + d * weight


def the_larger(mean, weight, decay, n):
    d = max(decay, (1 + n) / (10 + n))
    return d * mean + (1 - d) * weight


def without_a_rise(mean, weight, decay, n):
    return decay * mean + (1 - decay) * weight


def in_place(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return weight.lerp_(mean, d)


EXERCISES = (
    Exercise(
        ema_update,
        check_ema_update,
        wrong=(
            (exchanged, "it gets d"),
            (the_larger, "the larger of the two"),
            (without_a_rise, "d has to rise"),
            (in_place, "changes its argument weight in place"),
        ),
    ),
)
