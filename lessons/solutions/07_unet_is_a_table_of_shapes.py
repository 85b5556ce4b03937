"""Answers of lesson 07."""

from lessons.exercises import Exercise, difference


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


EXERCISES = (
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
        ),
    ),
)
