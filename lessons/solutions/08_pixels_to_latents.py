"""Answers of lesson 08."""

import torch

from lessons.exercises import Exercise, difference


def scaling_factor(latents):
    return 1 / latents.std()


def check_scaling_factor(function) -> str | None:
    """Of latents whose channels have means and sizes of their own, and whose pictures differ."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 6, 6, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    latents = latents * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1) + torch.tensor([2.0, -1.0, 3.0, 1.0]).reshape(4, 1, 1)
    mistakes = {
        "divides by the variance: multiplied by s it becomes s^2 as large, so take the root: 1 / latents.std()": over_variance(latents),
        "gives sigma itself, and the latents would grow further: take 1 / sigma": sigma(latents),
        "gives a factor for each channel, shape [4]: one number for all of them": for_each_channel(latents),
        "takes the mean square for the variance: the mean of all the numbers is not zero here and has to be taken off first": without_the_mean(
            latents
        ),
        "averages over pictures that were measured one by one, which leaves out how they differ: take std over everything at once": by_picture(
            latents
        ),
    }
    return difference(function(latents), scaling_factor(latents), mistakes, tolerance=1e-4)


def over_variance(latents):
    return 1 / latents.var()


def sigma(latents):
    return latents.std()


def for_each_channel(latents):
    return 1 / latents.std(dim=(0, 2, 3))


def without_the_mean(latents):
    return 1 / latents.square().mean().sqrt()


def by_picture(latents):
    return 1 / latents.std(dim=(1, 2, 3)).mean()


EXERCISES = (
    Exercise(
        scaling_factor,
        check_scaling_factor,
        wrong=(
            (over_variance, "divides by the variance"),
            (sigma, "sigma itself"),
            (for_each_channel, "for each channel"),
            (without_the_mean, "the mean square"),
            (by_picture, "one by one"),
        ),
    ),
)
