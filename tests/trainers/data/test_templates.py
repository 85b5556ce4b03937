"""The prompts around a new word: the published lists, and the bundled model's."""

from collections import Counter

import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from minidiff.scenes.art import COLOURS, STYLES
from minidiff.scenes.scenes import Item, caption_of
from minidiff.trainers.data.templates import OBJECT, SCENE_STYLE, STYLE, fill_in, scene_templates


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


def test_every_template_has_one_hole():
    assert all(template.count("{}") == 1 for template in OBJECT + STYLE + SCENE_STYLE + scene_templates(background="red", size="small"))


def test_a_colour_or_size_that_the_bundled_model_does_not_know_is_refused():
    with pytest.raises(ValueError, match="background 'teal' unknown; choose red, orange"):
        scene_templates(background="teal")
    with pytest.raises(ValueError, match="size 'tiny' unknown; choose small, large"):
        scene_templates(size="tiny")


def test_a_hole_in_the_phrase_is_no_hole():
    assert fill_in("a {} and a {}, {}", "{} apple") == "a {} apple and a {} apple, {} apple"
    assert fill_in("a {} on a {}", "apple") == "an apple on an apple"
