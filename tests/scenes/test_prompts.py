"""The fixed prompts are what the script draws, and ask what their groups say; real scenes show what a prompt asks."""

import itertools
from collections import Counter

import numpy as np
import pytest

from minidiff.scenes.art import visible_backgrounds
from minidiff.scenes.prompts import GROUPS, draw_prompts, fixed_prompts, real_scene
from minidiff.scenes.scenes import STYLES, is_held_out_pair, subject_names

TRAINING = subject_names(held_out=False)


def test_the_file_is_what_the_script_draws_but_for_backgrounds_and_the_subjects_stand_out_from_them():
    """They were drawn with an older sheet, whose colours differed a little, and are kept so that figures can be compared."""
    drawn, kept = draw_prompts(), fixed_prompts()
    assert [(p.group, p.subjects, p.relation, p.style, p.tint) for p in kept] == [
        (p.group, p.subjects, p.relation, p.style, p.tint) for p in drawn
    ]
    for prompt in kept:
        for name, style in itertools.product(prompt.subjects, (prompt.style,) if prompt.style else STYLES):
            assert prompt.background in visible_backgrounds(name, style, prompt.tint)


def test_another_seed_draws_others():
    assert list(fixed_prompts()) != draw_prompts(seed=1)


def test_the_groups_hold_what_they_should():
    prompts = fixed_prompts()
    groups = {name: [prompt for prompt in prompts if prompt.group == name] for name in GROUPS}
    assert {name: len(group) for name, group in groups.items()} == {"one": 110, "two": 60, "style": 36, "colour": 40}
    assert sorted(prompt.subjects[0] for prompt in groups["one"]) == sorted(TRAINING)
    assert Counter((p.relation, p.held_out) for p in groups["two"]) == {
        (relation, held_out): count for relation in ("and", "left of", "above") for held_out, count in ((True, 5), (False, 15))
    }
    assert set(Counter(p.subjects[0] for p in groups["style"]).values()) == {3}
    assert Counter(p.style for p in groups["style"]) == dict.fromkeys(STYLES, 12)
    assert len({p.subjects[0] for p in groups["colour"]}) == 40
    assert len({p.text for p in prompts}) == 246 - len({p.text for p in groups["one"]} & {p.text for p in groups["style"]})


def test_what_is_held_out_of_training_is_so_in_the_prompts():
    for prompt in fixed_prompts():
        assert set(prompt.subjects) <= set(TRAINING)
        pair = prompt.subjects if len(prompt.subjects) == 2 else (prompt.subjects[0], prompt.tint or "no tint")
        if len(prompt.subjects) == 2 or prompt.tint:
            assert is_held_out_pair(*pair) == prompt.held_out


@pytest.mark.parametrize("group", GROUPS)
def test_a_real_scene_shows_what_its_prompt_says(group):
    for i, prompt in enumerate(fixed_prompts()):
        if prompt.group != group:
            continue
        scene = real_scene(prompt, np.random.default_rng(i))
        assert scene.caption == prompt.text
        assert scene.background == prompt.background and prompt.style in (None, scene.style)
        assert [(thing.subject, thing.colour, thing.size) for thing in scene.objects] == [
            (name, prompt.tint, None) for name in prompt.subjects
        ]
        if prompt.relation in ("left of", "above"):
            first, second = (thing.box for thing in scene.objects)
            edge = 0 if prompt.relation == "left of" else 1
            assert first[edge + 2] <= second[edge]


def test_a_real_scene_depends_on_its_random_numbers_alone():
    prompt = fixed_prompts()[0]
    first, again, other = (real_scene(prompt, np.random.default_rng(seed)).image for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
