"""Answers of lesson 02."""

import torch

from lessons.exercises import Exercise, difference
from minidiff.config import SD1
from minidiff.schedule import NoiseSchedule


def diffusion_loss(model, schedule, x_0, t, eps):
    x_t = schedule.q_sample(x_0, t, eps)
    return (model(x_t, t) - eps).square().mean(dim=-1)


def check_diffusion_loss(function) -> str | None:
    """With a model that depends on both of its inputs."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 2, generator=generator) for _ in range(2))
    t = torch.tensor([20, 300, 600, 999])
    arguments = (toy, NoiseSchedule(SD1.schedule), x_0, t, eps)
    mistakes = {
        "compares the answer with x_0: the network is asked for the noise, so the target is eps": against_the_point(*arguments),
        "shows the clean x_0 to the network: make x_t with schedule.q_sample first, and show that": shown_clean(*arguments),
        "averages over the batch too, to one number: give one loss a sample, shape [4], by mean(dim=-1)": one_number(*arguments),
        "adds the two squares up, which is twice the loss: take their mean": summed(*arguments),
        "gives the bare difference, which cancels out: square it": not_squared(*arguments),
    }
    return difference(function(*arguments), diffusion_loss(*arguments), mistakes)


def toy(x_t, t):
    return 0.5 * x_t + t[:, None] / 1000


def against_the_point(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - x_0).square().mean(dim=-1)


def shown_clean(model, schedule, x_0, t, eps):
    return (model(x_0, t) - eps).square().mean(dim=-1)


def one_number(model, schedule, x_0, t, eps):
    return diffusion_loss(model, schedule, x_0, t, eps).mean()


def summed(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).square().sum(dim=-1)


def not_squared(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).mean(dim=-1)


EXERCISES = (
    Exercise(
        diffusion_loss,
        check_diffusion_loss,
        wrong=(
            (against_the_point, "the target is eps"),
            (shown_clean, "shows the clean x_0"),
            (one_number, "averages over the batch"),
            (summed, "adds the two squares"),
            (not_squared, "bare difference"),
        ),
    ),
)
