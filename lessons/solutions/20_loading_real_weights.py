"""Answers of lesson 20."""

from lessons.exercises import Exercise, difference

INSIDE = {"blocks": "0", "transformers": "1", "downsample": "0.op"}
ASKED = (  # places that tell the mistakes apart, and blocks a level
    ("down.0.blocks.1", 2),
    ("down.2.transformers.0", 2),
    ("down.1.downsample", 2),
    ("up.1.blocks.2", 2),
    ("up.2.transformers.0", 2),
    ("down.2.blocks.0", 1),
    ("up.1.transformers.1", 1),
)


def place_in_ldm(ours, blocks_per_level):
    way, level, kind, *j = ours.split(".")
    steps = blocks_per_level + 1  # the level's blocks, and its downsampling or one block more
    step = int(level) * steps + (int(j[0]) if j else blocks_per_level)
    item = {"blocks": "0", "transformers": "1", "downsample": "0.op"}[kind]
    return f"input_blocks.{step + 1}.{item}" if way == "down" else f"output_blocks.{step}.{item}"  # input_blocks.0 is the first convolution


def check_place_in_ldm(function) -> str | None:
    mistakes = {
        "begins to count at the first block; input_blocks.0 is the first convolution, so add 1 on the way down": from_zero,
        "leaves out the step that halves the resolution: a level takes blocks_per_level + 1 steps": without_downsample,
        "adds 1 on the way up too; output_blocks.0 is the first block of the deepest level": one_more_on_the_way_up,
        "takes the transformer for a step of its own; it is item 1 of the same step as its ResBlock": transformers_as_steps,
        "gives the whole name of the weights; leave out what comes before input_blocks": with_prefix,
    }
    for ours, blocks_per_level in ASKED:
        expected = place_in_ldm(ours, blocks_per_level)
        given = {sentence: wrong(ours, blocks_per_level) for sentence, wrong in mistakes.items()}
        if said := difference(function(ours, blocks_per_level), expected, given, of=f"for {ours!r} and {blocks_per_level} blocks a level"):
            return said
    return None


def from_zero(ours, blocks_per_level):
    way, level, kind, *j = ours.split(".")
    step = int(level) * (blocks_per_level + 1) + (int(j[0]) if j else blocks_per_level)
    return f"{'input' if way == 'down' else 'output'}_blocks.{step}.{INSIDE[kind]}"


def without_downsample(ours, blocks_per_level):
    way, level, kind, *j = ours.split(".")
    step = int(level) * blocks_per_level + (int(j[0]) if j else blocks_per_level)
    return f"input_blocks.{step + 1}.{INSIDE[kind]}" if way == "down" else f"output_blocks.{step}.{INSIDE[kind]}"


def one_more_on_the_way_up(ours, blocks_per_level):
    way, level, kind, *j = ours.split(".")
    step = int(level) * (blocks_per_level + 1) + (int(j[0]) if j else blocks_per_level)
    return f"{'input' if way == 'down' else 'output'}_blocks.{step + 1}.{INSIDE[kind]}"


def transformers_as_steps(ours, blocks_per_level):
    right = place_in_ldm(ours, blocks_per_level)
    blocks, step, item = right.split(".", 2)
    return f"{blocks}.{int(step) + 1}.0" if item == "1" else right


def with_prefix(ours, blocks_per_level):
    return "model.diffusion_model." + place_in_ldm(ours, blocks_per_level)


EXERCISES = (
    Exercise(
        place_in_ldm,
        check_place_in_ldm,
        wrong=(
            (from_zero, "is the first convolution"),
            (without_downsample, "halves the resolution"),
            (one_more_on_the_way_up, "on the way up too"),
            (transformers_as_steps, "a step of its own"),
            (with_prefix, "the whole name"),
        ),
    ),
)
