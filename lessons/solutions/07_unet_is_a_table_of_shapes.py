"""Answers of lesson 07."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from lessons.common import distance, picture_grid
from lessons.exercises import Exercise, Misuse, difference

# ------------------------------------------------------------------------------------------------------ u_net


def u_net(down, middle, up, x):
    skips = []
    for layer in down:
        x = layer(x)
        skips.append(x)
    x = middle(x)
    for layer in up:
        x = layer(torch.cat([x, skips.pop()], dim=1))
    return x


def check_u_net(function) -> str | None:
    """On layers that keep the shape, so that a skip in a wrong place goes through without an error."""

    def of_the_way_up(i):
        def layer(x):
            if x.shape[0] != 2:
                raise Misuse("joins x and its skip along the batch: the channels are dim=1")
            if x.shape[1] == 3:
                raise Misuse(
                    "hands a layer of the way up 3 channels, expected 3 + 3: torch.cat([x, skip], dim=1) appends those of the skip"
                )
            if x.shape[1] != 6:
                raise Misuse(f"hands a layer of the way up {x.shape[1]} channels, expected 3 of x and 3 of its own skip alone")
            return (i + 1) * x[:, :3] + (0.3 * i - 0.7) * x[:, 3:]

        return layer

    down = [lambda x, i=i: (i + 1) * x + i for i in range(3)]
    up = [of_the_way_up(i) for i in range(3)]
    arguments = (down, lambda x: x.square() / 10, up, torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    mistakes = {
        "takes the skips first in, first out: pop() without a number takes the last one": first_in_first_out,
        "puts the input of each layer on the stack: what leaves it is the skip": inputs_on_the_stack,
        "takes the same skip every time: pop() removes it, skips[-1] leaves it there": without_removing,
        "puts the skip before x: torch.cat([x, skip], dim=1), x comes first": skip_first,
        "leaves out the middle: it comes between the last of down and the first of up": without_middle,
        "puts the middle's output on the stack too: only those of down are skips": middle_on_the_stack,
        "gives every layer of down the first x: each gets what the one before it returned": always_the_first,
        "returns what leaves the middle: the way up follows": ends_in_the_middle,
        "goes through `up` backwards: its functions come in the order in which they are called": up_backwards,
    }
    return difference(function(*arguments), u_net(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _down(down, x):
    skips = []
    for layer in down:
        x = layer(x)
        skips.append(x)
    return skips


def _up(up, x, skips):
    for layer, skip in zip(up, skips):
        x = layer(torch.cat([x, skip], dim=1))
    return x


def first_in_first_out(down, middle, up, x):
    skips = _down(down, x)
    return _up(up, middle(skips[-1]), skips)


def inputs_on_the_stack(down, middle, up, x):
    skips = _down(down, x)
    return _up(up, middle(skips[-1]), [x, *skips[:-1]][::-1])


def without_removing(down, middle, up, x):
    skips = _down(down, x)
    return _up(up, middle(skips[-1]), [skips[-1]] * len(up))


def skip_first(down, middle, up, x):
    skips = _down(down, x)
    x = middle(skips[-1])
    for layer, skip in zip(up, skips[::-1]):
        x = layer(torch.cat([skip, x], dim=1))
    return x


def without_middle(down, middle, up, x):
    return u_net(down, lambda x: x, up, x)


def middle_on_the_stack(down, middle, up, x):
    skips = _down(down, x)
    skips.append(middle(skips[-1]))
    return _up(up, skips[-1], skips[::-1])


def always_the_first(down, middle, up, x):
    skips = [layer(x) for layer in down]
    return _up(up, middle(skips[-1]), skips[::-1])


def ends_in_the_middle(down, middle, up, x):
    return middle(_down(down, x)[-1])


def up_backwards(down, middle, up, x):
    return u_net(down, middle, up[::-1], x)


def added(down, middle, up, x):
    skips = _down(down, x)
    x = middle(skips[-1])
    for layer in up:
        x = layer(x + skips.pop())
    return x


def joined_along_the_batch(down, middle, up, x):
    skips = _down(down, x)
    x = middle(skips[-1])
    for layer in up:
        x = layer(torch.cat([x, skips.pop()]))
    return x


def all_skips_at_once(down, middle, up, x):
    skips = _down(down, x)
    x = middle(skips[-1])
    for layer in up:
        x = layer(torch.cat([x, *skips], dim=1))
    return x


def pops_too_often(down, middle, up, x):
    skips = _down(down, x)
    x = middle(skips.pop())
    for layer in up:
        x = layer(torch.cat([x, skips.pop()], dim=1))
    return x


def _ring() -> torch.Tensor:
    across = torch.linspace(-1, 1, 32)
    radius = (across[:, None].square() + across.square()).sqrt()
    return ((radius - 0.6).abs() < 0.12).float()[None, None]


def _doubled(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _small_u_net(function, use_skips: bool) -> torch.Tensor:
    """From 32 x 32 to 4 x 4 cells and back. The way up adds what each skip has and its own smaller copy has not."""

    def detail(x):
        below, skip = x[:, :1], x[:, 1:]
        return below + (skip - _doubled(F.avg_pool2d(skip, 2)) if use_skips else 0)

    halve = lambda x: F.avg_pool2d(x, 2)
    up = [lambda x: _doubled(detail(x)), lambda x: _doubled(detail(x)), detail]
    return function([lambda x: x, halve, halve], lambda x: _doubled(halve(x)), up, _ring())


def number_u_net(function) -> str:
    off = [distance(_small_u_net(function, use_skips), _ring()) for use_skips in (True, False)]
    return f"a ring of 32 x 32 cells goes down to 4 x 4 and comes back off by {off[0]:.2f} with its skips, by {off[1]:.2f} without"


def picture_u_net(function) -> Figure:
    pictures = (_ring(), _small_u_net(function, True), _small_u_net(function, False))
    return picture_grid([[picture[0, 0] for picture in pictures]], ["in", "out, with skips", "without"])


# ------------------------------------------------------------------------------------------------------ skip_shapes


def skip_shapes(widths, blocks_per_level, side):
    skips = [(widths[0], side)]
    for i, width in enumerate(widths):
        skips += [(width, side)] * blocks_per_level
        if i < len(widths) - 1:
            side = (side + 1) // 2
            skips.append((width, side))
    return skips


def check_skip_shapes(function) -> str | None:
    """An even side first, then an odd one, where rounding shows."""
    for side in (8, 5):
        arguments = ((32, 64, 96), 2, side)
        mistakes = {
            "leaves out what leaves conv_in: the first skip is (32, side), before any block": without_conv_in(*arguments),
            "leaves out what leaves the halvings: each is a skip too, with its level's channels and the smaller side": without_halvings(
                *arguments
            ),
            "halves after the last level too: the last level has no halving, the middle has its size": halved_at_the_end(*arguments),
            "gives the halving the next level's channels: it keeps its own, the next ResBlock widens": widened_by_the_halving(*arguments),
            "rounds down: 5 cells become 3, so (side + 1) // 2": rounded_down(*arguments),
            "has one block a level too many: that is the way up; here each level has 2": one_block_more(*arguments),
            "gives the halving its old side: what leaves it has the smaller side already": old_side(*arguments),
            "lists the last skip first: they come in the order in which they are made": in_reverse(*arguments),
            "gives side before channels: each tuple is (channels, side)": other_order(*arguments),
        }
        said = difference(function(*arguments), skip_shapes(*arguments), mistakes, of=f"for widths (32, 64, 96), 2 blocks, side {side}")
        if said is not None:
            return said
    return None


def without_conv_in(widths, blocks_per_level, side):
    return skip_shapes(widths, blocks_per_level, side)[1:]


def without_halvings(widths, blocks_per_level, side):
    skips = [(widths[0], side)]
    for width in widths:
        skips += [(width, side)] * blocks_per_level
        side = (side + 1) // 2
    return skips


def halved_at_the_end(widths, blocks_per_level, side):
    skips = skip_shapes(widths, blocks_per_level, side)
    return [*skips, (widths[-1], (skips[-1][1] + 1) // 2)]


def widened_by_the_halving(widths, blocks_per_level, side):
    skips = [(widths[0], side)]
    for i, width in enumerate(widths):
        skips += [(width, side)] * blocks_per_level
        if i < len(widths) - 1:
            side = (side + 1) // 2
            skips.append((widths[i + 1], side))
    return skips


def rounded_down(widths, blocks_per_level, side):
    skips = [(widths[0], side)]
    for i, width in enumerate(widths):
        skips += [(width, side)] * blocks_per_level
        if i < len(widths) - 1:
            side = side // 2
            skips.append((width, side))
    return skips


def one_block_more(widths, blocks_per_level, side):
    return skip_shapes(widths, blocks_per_level + 1, side)


def old_side(widths, blocks_per_level, side):
    skips = [(widths[0], side)]
    for i, width in enumerate(widths):
        skips += [(width, side)] * blocks_per_level
        if i < len(widths) - 1:
            skips.append((width, side))
            side = (side + 1) // 2
    return skips


def in_reverse(widths, blocks_per_level, side):
    return skip_shapes(widths, blocks_per_level, side)[::-1]


def other_order(widths, blocks_per_level, side):
    return [(side, channels) for channels, side in skip_shapes(widths, blocks_per_level, side)]


def number_skip_shapes(function) -> str:
    skips = function((320, 640, 1280, 1280), 2, 64)
    (first, largest), (last, smallest) = skips[0], skips[-1]
    return f"{len(skips)} skips, from {first} channels of {largest} x {largest} to {last} of {smallest} x {smallest}"


# ------------------------------------------------------------------------------------------------------ conv_cost


def conv_cost(c_in, c_out, k, side):
    weights = c_in * c_out * k * k
    return weights + c_out, weights * side * side


def check_conv_cost(function) -> str | None:
    arguments = (8, 12, 3, 5)
    mistakes = {
        "leaves out the biases: one for each output channel": without_biases,
        "has one bias for each input channel: they belong to the output channels": biases_of_the_input,
        "counts k places: a convolution of k x k looks at k * k places of its input": one_side_of_the_kernel,
        "adds the channels: there is a weight for each pair of them, c_in * c_out": channels_added,
        "multiplies by side once: the output has side * side cells": one_side_of_the_output,
        "multiplies the biases too: they are added, so they are no multiplications": biases_multiplied,
        "gives the multiplications first: the parameters come first": other_way_round,
        "leaves out c_in: every output channel looks at all input channels": each_channel_by_itself,
    }
    said = difference(function(*arguments), conv_cost(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})
    return said and said.replace("; no slip", " from 8 to 12 channels with k = 3 and side 5; no slip")


def without_biases(c_in, c_out, k, side):
    return c_in * c_out * k * k, c_in * c_out * k * k * side * side


def biases_of_the_input(c_in, c_out, k, side):
    return c_in * c_out * k * k + c_in, c_in * c_out * k * k * side * side


def one_side_of_the_kernel(c_in, c_out, k, side):
    return c_in * c_out * k + c_out, c_in * c_out * k * side * side


def channels_added(c_in, c_out, k, side):
    return (c_in + c_out) * k * k + c_out, (c_in + c_out) * k * k * side * side


def one_side_of_the_output(c_in, c_out, k, side):
    return conv_cost(c_in, c_out, k, side)[0], c_in * c_out * k * k * side


def biases_multiplied(c_in, c_out, k, side):
    weights = conv_cost(c_in, c_out, k, side)[0]
    return weights, weights * side * side


def other_way_round(c_in, c_out, k, side):
    return conv_cost(c_in, c_out, k, side)[::-1]


def each_channel_by_itself(c_in, c_out, k, side):
    return c_out * k * k + c_out, c_out * k * k * side * side


def number_conv_cost(function) -> str:
    (weights, products), (more_weights, more_products) = function(320, 320, 3, 64), function(640, 640, 3, 32)
    return (
        f"twice the channels on half the side: {more_weights / weights:.1f} times the parameters, "
        f"{more_products / products:.1f} times the multiplications"
    )


EXERCISES = (
    Exercise(
        u_net,
        check_u_net,
        wrong=(
            (first_in_first_out, "first in, first out"),
            (inputs_on_the_stack, "puts the input of each layer"),
            (without_removing, "the same skip every time"),
            (skip_first, "the skip before x"),
            (without_middle, "leaves out the middle"),
            (middle_on_the_stack, "the middle's output on the stack"),
            (always_the_first, "every layer of down the first x"),
            (ends_in_the_middle, "what leaves the middle"),
            (up_backwards, "backwards"),
            (added, "3 channels, expected 3 + 3"),
            (joined_along_the_batch, "along the batch"),
            (all_skips_at_once, "its own skip alone"),
            (pops_too_often, "more is taken from a list"),
        ),
        number=number_u_net,
        picture=picture_u_net,
    ),
    Exercise(
        skip_shapes,
        check_skip_shapes,
        wrong=(
            (without_conv_in, "leaves conv_in"),
            (without_halvings, "leaves the halvings"),
            (halved_at_the_end, "after the last level"),
            (widened_by_the_halving, "next level's channels"),
            (rounded_down, "rounds down"),
            (one_block_more, "too many"),
            (old_side, "its old side"),
            (in_reverse, "the last skip first"),
            (other_order, "side before channels"),
        ),
        number=number_skip_shapes,
    ),
    Exercise(
        conv_cost,
        check_conv_cost,
        wrong=(
            (without_biases, "leaves out the biases"),
            (biases_of_the_input, "for each input channel"),
            (one_side_of_the_kernel, "counts k places"),
            (channels_added, "adds the channels"),
            (one_side_of_the_output, "multiplies by side once"),
            (biases_multiplied, "multiplies the biases"),
            (other_way_round, "the multiplications first"),
            (each_channel_by_itself, "leaves out c_in"),
        ),
        number=number_conv_cost,
    ),
)
