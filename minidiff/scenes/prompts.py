"""The fixed prompts of the bundled model's evaluation, and real scenes that show what they say.

prompts.json holds them: drawn once at random (`draw_prompts`), before any training, and unchanged since, even when the
sheet of art was made anew, whose colours would now draw five other backgrounds. 246 in four groups:

    one      each of the 110 training subjects once       a cat on a green background
    two      20 each with and, left of, above             a cat left of a key on a green background
    style    12 subjects, each in the three styles        a cat on a green background in noto style
    colour   40 (subject, tint) pairs held out of training    a purple cat on a green background

    python -m minidiff.scenes.prompts > minidiff/scenes/prompts.json
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from minidiff.scenes.art import common_backgrounds
from minidiff.scenes.scenes import (
    RELATIONS,
    STYLES,
    Item,
    Scene,
    caption_of,
    choose,
    compose,
    held_out_pairs,
    is_held_out_pair,
    place_one,
    place_two,
    subject_names,
)

GROUPS = ("one", "two", "style", "colour")
HELD_OUT_EVERY = 4  # of the prompts with two subjects, every fourth has a pair that training never shows


@dataclass(frozen=True)
class FixedPrompt:
    """A prompt, and what its pictures should show. held_out: training shows each word, never this pair of them."""

    text: str
    group: str
    subjects: tuple[str, ...]
    background: str
    relation: str | None = None
    style: str | None = None
    tint: str | None = None
    held_out: bool = False


@cache
def fixed_prompts() -> tuple[FixedPrompt, ...]:
    """Read all prompts, group after group."""
    rows = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    return tuple(FixedPrompt(**{**row, "subjects": tuple(row["subjects"])}) for row in rows)


def draw_prompts(seed: int = 0) -> list[FixedPrompt]:
    """Draw random prompts of training subjects, on backgrounds from which these stand out in every style."""
    rng = np.random.default_rng(seed)
    names = subject_names(held_out=False)

    def shuffled(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [pairs[i] for i in rng.permutation(len(pairs))]

    one = [draw_prompt(rng, "one", [name]) for name in names]

    pairs = [pair for pair in itertools.permutations(names, 2) if common_backgrounds([(name, None) for name in pair])]
    known = iter(shuffled([pair for pair in pairs if not is_held_out_pair(*pair)]))
    new = iter(shuffled([pair for pair in pairs if is_held_out_pair(*pair)]))
    two = [
        draw_prompt(rng, "two", next(new if held_out else known), relation=relation, held_out=held_out)
        for relation in RELATIONS
        for held_out in (i % HELD_OUT_EVERY == 0 for i in range(20))
    ]

    plain = [draw_prompt(rng, "style", [names[i]]) for i in rng.permutation(len(names))[:12]]
    styled = [dataclasses.replace(one, text=f"{one.text} in {style} style", style=style) for one in plain for style in STYLES]

    tinted = dict(shuffled(held_out_pairs()[1]))  # one tint a subject
    coloured = [draw_prompt(rng, "colour", [name], tint=tint, held_out=True) for name, tint in itertools.islice(tinted.items(), 40)]
    return one + two + styled + coloured


def draw_prompt(
    rng: np.random.Generator,
    group: str,
    subjects: Sequence[str],
    *,
    relation: str | None = None,
    tint: str | None = None,
    held_out: bool = False,
) -> FixedPrompt:
    """Draw the background of a prompt, one from which its subjects stand out in every style.

    Args:
        rng: The source of randomness.
        group, subjects, relation, tint, held_out: As in `FixedPrompt`.
    """
    background = choose(rng, common_backgrounds([(name, tint) for name in subjects]))
    text = caption_of([Item(name, colour=tint) for name in subjects], relation, background, None)
    return FixedPrompt(text, group, tuple(subjects), background, relation, None, tint, held_out)


@cache
def prompts() -> tuple[FixedPrompt, ...]:
    """Return 40 prompts, "a SUBJECT on a COLOUR background", drawn once at random from what training may show: for looks on the way."""
    rng = np.random.default_rng(40)
    return tuple(draw_prompt(rng, "one", [str(name)]) for name in rng.permutation(subject_names(held_out=False))[:40])


def real_scene(prompt: FixedPrompt, rng: np.random.Generator) -> Scene:
    """Compose a scene that shows what the prompt says, like those of training; what the prompt leaves open is random."""
    style = prompt.style or choose(rng, STYLES)
    if len(prompt.subjects) == 1:
        layout = [place_one(rng, prompt.subjects[0], style)]
        while layout[0][1] is not None:  # scenes whose caption names no size have things of middling size
            layout = [place_one(rng, prompt.subjects[0], style)]
    else:
        layout = place_two(rng, prompt.subjects, style, prompt.relation)
    return compose(
        [Item(name, px, centre, prompt.tint) for name, (px, _, centre) in zip(prompt.subjects, layout)],
        background=prompt.background,
        style=style,
        relation=prompt.relation,
        name_style=prompt.style is not None,
        shade=rng.normal(0, 5, 3).tolist(),
        gradient=float(rng.uniform(-0.12, 0.12)) if rng.random() < 0.5 else 0.0,
    )


if __name__ == "__main__":
    rows = [json.dumps(dataclasses.asdict(prompt)) for prompt in draw_prompts()]
    print("[\n" + ",\n".join(rows) + "\n]")
