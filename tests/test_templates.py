"""The prompts around a new word: the published lists, the bundled model's, and how one is drawn."""

from collections import Counter

import numpy as np
import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from minidiff.scenes.art import COLOURS, STYLES
from minidiff.scenes.scenes import Item, caption_of
from minidiff.trainers.templates import OBJECT, SCENE_STYLE, STYLE, check_templates, draw_prompt, scene_templates


def test_the_object_templates_are_27_of_which_clips_own_list_has_all_but_one():
    clip = {template("{}").rstrip(".") for template in OPENAI_IMAGENET_TEMPLATES}
    assert len(OBJECT) == len(set(OBJECT)) == 27
    assert [template for template in OBJECT if template not in clip] == ["the photo of a {}"]


def test_the_style_templates_are_19_two_of_them_twice():
    assert len(STYLE) == 19 and all(template.endswith(" in the style of {}") for template in STYLE)
    assert sorted(template for template, count in Counter(STYLE).items() if count == 2) == [
        "a close-up painting in the style of {}",
        "a cropped painting in the style of {}",
    ]


@pytest.mark.parametrize("background", [None, *COLOURS])
@pytest.mark.parametrize("size", [None, "small", "large"])
def test_the_bundled_models_templates_are_captions_of_its_scenes(background, size):
    item = Item("dog", size=size)
    media = (None, "photo", "picture", "image", "icon")
    captions = {caption_of([item], None, background, None, medium) for medium in media}
    assert {template.replace("{}", "dog") for template in scene_templates(background=background, size=size)} == captions


def test_the_bundled_models_style_templates_say_the_style_as_its_captions_do():
    ends = {f" in {style} style" for style in STYLES}
    assert all(any(template.replace("{}", style).endswith(end) for end in ends) for template in SCENE_STYLE for style in STYLES)


def test_every_template_is_drawn_as_often():
    rng = np.random.default_rng(0)
    drawn = Counter(draw_prompt(rng, OBJECT, "<cat>") for _ in range(2700))
    assert drawn.keys() == {template.replace("{}", "<cat>") for template in OBJECT}
    assert all(60 < count < 150 for count in drawn.values())  # 100 each, +- 4 or 5 standard deviations of 9.8
    assert draw_prompt(rng, ("a {}",), "{x} {}") == "a {x} {}"


def test_templates_without_a_hole_are_refused():
    check_templates(OBJECT + STYLE + SCENE_STYLE + scene_templates(background="red", size="small"))
    for templates, message in (
        ((), "no templates; give at least one"),
        (("a {}", "a photo"), "template 'a photo': expected {} once"),
        (("{} and {}",), "template '{} and {}': expected {} once"),
    ):
        with pytest.raises(ValueError, match=message):
            check_templates(templates)
    with pytest.raises(ValueError, match="background 'teal' unknown; choose red, orange"):
        scene_templates(background="teal")
    with pytest.raises(ValueError, match="size 'tiny' unknown; choose small, large"):
        scene_templates(size="tiny")
