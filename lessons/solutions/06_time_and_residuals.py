"""Answers of lesson 06."""

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure

from lessons.common import curves
from lessons.exercises import Exercise, difference
from minidiff import blocks
from minidiff.blocks import ResBlock

# ------------------------------------------------------------------------------------------------------ timestep_embedding


def timestep_embedding(t, width):
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = t[:, None] * frequencies.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_timestep_embedding(function) -> str | None:
    """Of as many timesteps as there are hands, where a missing axis would go unnoticed; late ones among them."""
    t, width = torch.tensor([0, 1, 40, 999]), 8
    mistakes = {
        "puts the sines first: Stable Diffusion has the cosines first": sines_first,
        "lets cosines and sines take turns: all 4 cosines come first, then all 4 sines": taking_turns,
        "divides i by h - 1, so the slowest frequency is 1/10000: Stable Diffusion divides by h, here 4": divided_by_h_minus_1,
        "divides i by the width 8, so the hands are not slow enough: divide by h, half of it": divided_by_width,
        "multiplies each t by one frequency only: t[:, None] has shape [4, 1] and meets all of them": without_the_axis,
        "turns t by the reciprocals of the frequencies, the hands getting faster: the exponent is -i/h": faster,
        "returns the angles: take their cosines and sines": angles_alone,
        "has as many hands as the vector is wide, so it gives 16 numbers: half of the 8 are cosines, half sines": too_many_hands,
    }
    # Angles run to 999, of which float32 knows the fourth decimal.
    return difference(
        function(t, width),
        timestep_embedding(t, width),
        {sentence: slip(t, width) for sentence, slip in mistakes.items()},
        of="at t = [0, 1, 40, 999]",
        tolerance=1e-3,
    )


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


def angles_alone(t, width):
    return angles_of(t, width, width // 2)


def too_many_hands(t, width):
    return timestep_embedding(t, 2 * width)


def number_timestep_embedding(function) -> str:
    waves = function(torch.tensor([100, 140, 800, 840]), 64)
    early, late = (float(waves[i] @ waves[i + 1]) / 32 for i in (0, 2))
    return f"t = 100 and 140 are alike by {early:.3f}, t = 800 and 840 by {late:.3f}: only the distance counts"


def picture_timestep_embedding(function) -> Figure:
    waves, t = function(torch.arange(1000), 8), range(1000)
    lines = {f"hand {i}": (t, waves[:, i]) for i in (1, 2, 3)}
    return curves(lines, "timestep t", "cosine")


# ------------------------------------------------------------------------------------------------------ group_norm


def group_norm(x, groups, eps):
    grouped = rearrange(x, "B (g c) H W -> B g (c H W)", g=groups)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred / (variance + eps).sqrt()).reshape(x.shape)


def library_group_norm(x, groups, eps):
    return F.group_norm(x, groups, eps=eps)


def check_group_norm(function) -> str | None:
    """Of channels with means and sizes of their own, and with an eps that shows."""
    generator = torch.Generator().manual_seed(0)
    sizes, means = torch.rand(2, 3, 6, 1, 1, generator=generator)
    arguments = (sizes * torch.randn(3, 6, 2, 2, generator=generator) + 3 * means, 2, 0.1)
    mistakes = {
        "leaves the mean in: subtract each group's mean first": mean_left,
        "divides by the variance: the root of it brings the variance to 1": over_variance,
        "adds eps after the root: it belongs to the variance, sqrt(variance + eps)": eps_outside,
        "leaves out eps: it keeps a group of equal numbers from a division by zero": without_eps,
        "takes the unbiased variance, over n - 1: here it is the plain mean of the squares": unbiased,
        "takes all channels as one group: each of the 2 groups has a mean and a variance of its own": one_group,
        "takes each channel by itself: a group is several channels together, here 3": each_channel,
        "puts every second channel into a group: neighbours belong together, so split them as (g c), not (c g)": alternating,
        "takes one mean for the whole batch: pictures must not depend on each other": over_the_batch,
        "only takes the mean off: divide by the root of the variance as well": mean_only,
        "gives shape [3, 2, 12], the groups still apart: bring it back to the shape of x": ungrouped,
    }
    return difference(function(*arguments), group_norm(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _grouped(x, groups):
    grouped = rearrange(x, "B (g c) H W -> B g (c H W)", g=groups)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    return grouped, centred, centred.square().mean(dim=-1, keepdim=True)


def mean_left(x, groups, eps):
    grouped, _, variance = _grouped(x, groups)
    return (grouped / (variance + eps).sqrt()).reshape(x.shape)


def over_variance(x, groups, eps):
    _, centred, variance = _grouped(x, groups)
    return (centred / (variance + eps)).reshape(x.shape)


def eps_outside(x, groups, eps):
    _, centred, variance = _grouped(x, groups)
    return (centred / (variance.sqrt() + eps)).reshape(x.shape)


def without_eps(x, groups, eps):
    return group_norm(x, groups, 0.0)


def unbiased(x, groups, eps):
    grouped, centred, _ = _grouped(x, groups)
    return (centred / (grouped.var(dim=-1, keepdim=True) + eps).sqrt()).reshape(x.shape)


def one_group(x, groups, eps):
    return group_norm(x, 1, eps)


def each_channel(x, groups, eps):
    return group_norm(x, x.shape[1], eps)


def alternating(x, groups, eps):
    turned = rearrange(x, "B (c g) H W -> B (g c) H W", g=groups)
    return rearrange(group_norm(turned, groups, eps), "B (g c) H W -> B (c g) H W", g=groups)


def over_the_batch(x, groups, eps):
    together = rearrange(x, "B C H W -> 1 C B (H W)")
    return rearrange(group_norm(together, groups, eps), "1 C B (H W) -> B C H W", H=x.shape[2])


def mean_only(x, groups, eps):
    return _grouped(x, groups)[1].reshape(x.shape)


def ungrouped(x, groups, eps):
    _, centred, variance = _grouped(x, groups)
    return centred / (variance + eps).sqrt()


def without_keepdim(x, groups, eps):
    grouped = rearrange(x, "B (g c) H W -> B g (c H W)", g=groups)
    return (grouped - grouped.mean(dim=-1)).reshape(x.shape)


def number_group_norm(function) -> str:
    x = 20 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 5
    out = function(x, 2, 1e-5)
    return f"mean {float(x.mean()):.1f} and deviation {float(x.std()):.1f} become {abs(float(out.mean())):.1f} and {float(out.std()):.1f}"


# ------------------------------------------------------------------------------------------------------ res_block


def res_block(block, x, time):
    h = block.conv_1(F.silu(block.norm_1(x)))
    h = h + block.time_projection(time)[:, :, None, None]
    h = block.conv_2(F.silu(block.norm_2(h)))
    return block.skip(x) + h


def library_res_block(block, x, time):
    return block(x, time)


def check_res_block(function) -> str | None:
    """First of a block that keeps its channels, then of one that changes them."""
    for channels in (8, 12):
        generator = torch.Generator().manual_seed(0)
        block = _fresh(8, channels)
        arguments = (block, torch.randn(2, 8, 5, 5, generator=generator), torch.randn(2, 6, generator=generator))
        mistakes = {
            "does not add the input: the last line is block.skip(x) + h": without_skip,
            "leaves the time out: block.time_projection(time) is added between the two halves": without_time,
            "adds the time after the second convolution: it comes between the two, so that norm_2 sees it": time_late,
            "leaves out a SiLU: one stands before each convolution": without_silu,
            "takes SiLU before the norm: norm first, then SiLU, then the convolution": silu_first,
            "convolves before it normalises: norm, SiLU, convolution, in this order": convolution_first,
            "leaves out the norms: x passes norm_1 first, the sum with the time norm_2": without_norms,
            "ends after the first half: norm_2, SiLU and conv_2 follow": half_a_block,
            "adds the input in the middle as well: it goes around both halves, and is added once, at the end": skip_twice,
            "multiplies by the time: each channel's number is added to its cells": time_multiplied,
        }
        with torch.no_grad():
            wrong = {sentence: result for sentence, slip in mistakes.items() if (result := _result(slip, arguments)) is not None}
            said = difference(function(*arguments), res_block(*arguments), wrong, of=f"of a block from 8 to {channels} channels")
        if said is not None:
            return said
    return None


def _fresh(c_in: int, c_out: int) -> ResBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResBlock(c_in, c_out, 4, 1e-5, 6)


def _result(slip, arguments):
    """What a slip gives; None where the number of channels forbids it."""
    try:
        return slip(*arguments)
    except RuntimeError:
        return None


def _first(block, x):
    return block.conv_1(F.silu(block.norm_1(x)))


def _time(block, time):
    return block.time_projection(time)[:, :, None, None]


def without_skip(block, x, time):
    return res_block(block, x, time) - block.skip(x)


def without_time(block, x, time):
    return block.skip(x) + block.conv_2(F.silu(block.norm_2(_first(block, x))))


def time_late(block, x, time):
    return without_time(block, x, time) + _time(block, time)


def without_silu(block, x, time):
    return block.skip(x) + block.conv_2(block.norm_2(block.conv_1(block.norm_1(x)) + _time(block, time)))


def silu_first(block, x, time):
    h = block.conv_1(block.norm_1(F.silu(x))) + _time(block, time)
    return block.skip(x) + block.conv_2(block.norm_2(F.silu(h)))


def convolution_first(block, x, time):
    h = F.silu(block.norm_1(block.conv_1(x))) + _time(block, time)
    return block.skip(x) + F.silu(block.norm_2(block.conv_2(h)))


def without_norms(block, x, time):
    return block.skip(x) + block.conv_2(F.silu(block.conv_1(F.silu(x)) + _time(block, time)))


def half_a_block(block, x, time):
    return block.skip(x) + _first(block, x) + _time(block, time)


def skip_twice(block, x, time):
    h = block.skip(x) + _first(block, x) + _time(block, time)
    return block.skip(x) + block.conv_2(F.silu(block.norm_2(h)))


def time_multiplied(block, x, time):
    return block.skip(x) + block.conv_2(F.silu(block.norm_2(_first(block, x) * _time(block, time))))


def x_itself(block, x, time):
    return x + without_skip(block, x, time)


def time_without_axes(block, x, time):
    return block.skip(x) + block.conv_2(F.silu(block.norm_2(_first(block, x) + block.time_projection(time))))


def number_res_block(function) -> str:
    """How much of x is left after sixteen blocks whose weights are random."""
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    out, time = x, torch.zeros(1, 6)
    with torch.no_grad():
        for _ in range(16):
            out = function(_fresh(8, 8), out, time)
    share = float(F.cosine_similarity(out.flatten(), x.flatten(), dim=0))
    return f"after 16 untrained blocks the output still resembles the input by {share:.2f} (1: the same, 0: not at all)"


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
            (angles_alone, "returns the angles"),
            (too_many_hands, "as many hands"),
        ),
        library=blocks.timestep_embedding,
        number=number_timestep_embedding,
        picture=picture_timestep_embedding,
    ),
    Exercise(
        group_norm,
        check_group_norm,
        wrong=(
            (mean_left, "leaves the mean in"),
            (over_variance, "divides by the variance"),
            (eps_outside, "adds eps after"),
            (without_eps, "leaves out eps"),
            (unbiased, "unbiased"),
            (one_group, "all channels as one group"),
            (each_channel, "each channel by itself"),
            (alternating, "every second channel"),
            (over_the_batch, "for the whole batch"),
            (mean_only, "only takes the mean off"),
            (ungrouped, "still apart"),
            (without_keepdim, "two tensors that do not fit"),
        ),
        library=library_group_norm,
        number=number_group_norm,
    ),
    Exercise(
        res_block,
        check_res_block,
        wrong=(
            (without_skip, "does not add the input"),
            (without_time, "leaves the time out"),
            (time_late, "after the second convolution"),
            (without_silu, "leaves out a SiLU"),
            (silu_first, "SiLU before the norm"),
            (convolution_first, "convolves before"),
            (without_norms, "leaves out the norms"),
            (half_a_block, "ends after the first half"),
            (skip_twice, "in the middle as well"),
            (time_multiplied, "multiplies by the time"),
            (x_itself, "the other 12"),
            (time_without_axes, "axis 3 "),
        ),
        library=library_res_block,
        number=number_res_block,
    ),
)
