"""Answers of lesson 06."""

import torch

from lessons.exercises import Exercise, difference


def timestep_embedding(t, width):
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = t[:, None] * frequencies.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_timestep_embedding(function) -> str | None:
    """Of as many timesteps as there are hands, where a missing axis would go unnoticed; late ones among them."""
    t, width = torch.tensor([0, 1, 40, 999]), 8
    mistakes = {
        "puts the sines first: Stable Diffusion has the cosines first": sines_first(t, width),
        "lets cosines and sines take turns: all 4 cosines come first, then all 4 sines": taking_turns(t, width),
        "divides i by h - 1, so the slowest frequency is 1/10000: Stable Diffusion divides by h, here 4": divided_by_h_minus_1(t, width),
        "divides i by the width 8, so the hands are not slow enough: divide by h, half of it": divided_by_width(t, width),
        "multiplies each t by one frequency only: t[:, None] has shape [4, 1] and meets all of them": without_the_axis(t, width),
        "turns t by the reciprocals of the frequencies, the hands getting faster: the exponent is -i/h": faster(t, width),
    }
    # Angles run to 999, of which float32 knows the fourth decimal.
    return difference(function(t, width), timestep_embedding(t, width), mistakes, of="at t = [0, 1, 40, 999]", tolerance=1e-3)


def angles_of(t, width, divisor):
    return t[:, None] * 10000.0 ** (-torch.arange(width // 2) / divisor)


def sines_first(t, width):
    angles = angles_of(t, width, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def taking_turns(t, width):
    angles = angles_of(t, width, width // 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def divided_by_h_minus_1(t, width):
    angles = angles_of(t, width, width // 2 - 1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def divided_by_width(t, width):
    angles = angles_of(t, width, width)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def without_the_axis(t, width):
    angles = t * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def faster(t, width):
    angles = angles_of(t, width, -(width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


EXERCISES = (
    Exercise(
        timestep_embedding,
        check_timestep_embedding,
        wrong=(
            (sines_first, "puts the sines first"),
            (taking_turns, "take turns"),
            (divided_by_h_minus_1, "by h - 1"),
            (divided_by_width, "by the width 8"),
            (without_the_axis, "one frequency only"),
            (faster, "getting faster"),
        ),
    ),
)
