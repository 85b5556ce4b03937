"""Answers of lesson 04."""

import math

import torch
from einops import rearrange

from lessons.exercises import Exercise, difference


def attend(q, k, v, heads):
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = logits.softmax(dim=-1)
    return rearrange(weights @ v, "B h N d -> B N (h d)")


def check_attend(function) -> str | None:
    """With fewer keys than queries, and queries long enough that the scale matters."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 6, 8, generator=generator)
    k, v = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    arguments = (q, k, v, 2)
    mistakes = {
        "leaves out the scale: divide the products by sqrt(d), here sqrt(4), before the softmax": without_scale(*arguments),
        "divides by sqrt(8), the root of the whole width D: d, the width of one head, is 4 here": scaled_by_width(*arguments),
        "takes the softmax over the queries: each query's shares of the 5 keys must add up to 1, so dim=-1": over_queries(*arguments),
        "takes every second number for a head: head 0 is the first 4 of the 8 numbers, so split them as (h d), not (d h)": interleaved(
            *arguments
        ),
        "gives shape [2, 2, 6, 4], with the heads still apart: merge them to [2, 6, 8]": unmerged(*arguments),
        "merges the heads in the wrong order: reshape keeps the memory's order B h N d; bring N before h first": badly_merged(*arguments),
    }
    return difference(function(*arguments), attend(*arguments), mistakes)


def without_scale(q, k, v, heads):
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange((q @ k.transpose(-1, -2)).softmax(dim=-1) @ v, "B h N d -> B N (h d)")


def scaled_by_width(q, k, v, heads):
    width = q.shape[-1]
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange((q @ k.transpose(-1, -2) / math.sqrt(width)).softmax(dim=-1) @ v, "B h N d -> B N (h d)")


def over_queries(q, k, v, heads):
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-2) @ v, "B h N d -> B N (h d)")


def interleaved(q, k, v, heads):
    q, k, v = (rearrange(x, "B N (d h) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v, "B h N d -> B N (d h)")


def unmerged(q, k, v, heads):
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def badly_merged(q, k, v, heads):
    return unmerged(q, k, v, heads).reshape(q.shape)


EXERCISES = (
    Exercise(
        attend,
        check_attend,
        wrong=(
            (without_scale, "leaves out the scale"),
            (scaled_by_width, "the whole width D"),
            (over_queries, "over the queries"),
            (interleaved, "every second number"),
            (unmerged, "heads still apart"),
            (badly_merged, "in the wrong order"),
        ),
    ),
)
