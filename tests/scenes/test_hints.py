"""The hints that scenes know exactly: where objects end, what they are, and which is in front."""

import numpy as np
import pytest

from minidiff.hints import canny, edge_f1
from minidiff.scenes.hints import SCENE_HINTS, class_colours, depth, outline, rim, segmentation
from minidiff.scenes.scenes import sample_scene

SCENES = [sample_scene(np.random.default_rng([7, i])) for i in range(40)]


@pytest.mark.parametrize("kind", SCENE_HINTS)
def test_every_hint_is_a_picture_of_the_scenes_size(kind):
    for scene in SCENES[:5]:
        hint = SCENE_HINTS[kind](scene)
        assert hint.shape == scene.image.shape and hint.dtype == np.uint8 and hint.any()


def test_a_rim_is_the_mask_without_its_inside():
    mask = np.zeros((12, 12), bool)
    mask[2:9, 3:8] = True
    expected = mask.copy()
    expected[3:8, 4:7] = False
    assert np.array_equal(rim(mask), expected)
    assert rim(np.ones((4, 4), bool)).sum() == 12  # the picture's rim ends an object too


def test_an_outline_lies_where_the_picture_has_edges():
    agree = [edge_f1(canny(scene.image), outline(scene)) for scene in SCENES]
    other = [edge_f1(canny(scene.image), outline(SCENES[i - 1])) for i, scene in enumerate(SCENES)]
    # Inside an object there are edges too, which no outline shows.
    assert np.mean(agree) > 0.75 and np.mean(other) < 0.4


def test_segmentation_tells_the_class_and_depth_the_order():
    assert len(set(class_colours().values())) == len(class_colours())
    for scene in SCENES:
        colours, order = segmentation(scene), depth(scene)
        for k, one in enumerate(scene.objects, start=1):
            inside = one.mask > 0.5
            assert (colours[inside] == class_colours()[one.class_name]).all()
            assert (order[inside] == round(255 * k / len(scene.objects))).all()
        outside = ~np.logical_or.reduce([one.mask > 0.5 for one in scene.objects])
        assert not colours[outside].any() and not order[outside].any()
