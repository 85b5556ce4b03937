"""Answers of lesson 00."""

import torch

from lessons.exercises import Exercise, difference


def to_bytes(pixels):
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    return values.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_to_bytes(function) -> str | None:
    """On pixels a little beyond their range, two pictures that are not square."""
    pixels = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    mistakes = {
        "lets values beyond -1 and 1 wrap round, so that the brightest become black: clamp before turning into uint8": without_clamp(
            pixels
        ),
        "cuts the fractions off, so that values are one too dark: round before turning into uint8": without_round(pixels),
        "leaves the colours where they were, shape [2, 3, 4, 5]: permute to [2, 4, 5, 3]": colours_first(pixels),
        "gives shape [2, 4, 5, 3] by reshape, which mixes colours with places: move the axis with permute": reshaped(pixels),
        "makes -1 and everything below 0 black: add 1 first, then multiply by 127.5": without_shift(pixels),
    }
    return difference(function(pixels), to_bytes(pixels), mistakes)


def without_clamp(pixels):
    return ((pixels + 1) * 127.5).round().to(torch.int16).to(torch.uint8).permute(0, 2, 3, 1)


def without_round(pixels):
    return ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)


def colours_first(pixels):
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def reshaped(pixels):
    return colours_first(pixels).reshape(2, 4, 5, 3)


def without_shift(pixels):
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


EXERCISES = (
    Exercise(
        to_bytes,
        check_to_bytes,
        wrong=(
            (without_clamp, "wrap round"),
            (without_round, "cuts the fractions"),
            (colours_first, "permute to [2, 4, 5, 3]"),
            (reshaped, "by reshape"),
            (without_shift, "add 1 first"),
        ),
    ),
)
