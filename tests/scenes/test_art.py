"""The art of the scenes: every subject in every style, sizes, and backgrounds that it stands out from."""

import numpy as np
import pytest

from minidiff.scenes.art import (
    CELL,
    COLOURS,
    STYLES,
    art,
    known,
    paint_background,
    scaled_size,
    subject_names,
    tint_picture,
    visible_backgrounds,
)


def test_subjects_are_split_into_those_of_training_and_those_held_out():
    assert len(subject_names(held_out=False)) == 110 and len(subject_names(held_out=True)) == 20


@pytest.mark.parametrize("style", STYLES)
def test_art_is_cut_to_what_is_drawn_and_keeps_its_shape_when_scaled(style):
    picture = art("cat", style)
    assert max(picture.shape[:2]) == CELL and picture[0, :, 3].any() and picture[:, -1, 3].any()
    width, height = scaled_size("cat", style, 64)
    assert max(width, height) == 64 and width / height == pytest.approx(picture.shape[1] / picture.shape[0], rel=0.05)  # whole pixels


def test_a_tint_changes_the_colour_and_not_the_outline():
    picture = art("cat", "noto")
    blue = tint_picture(picture, "blue")
    assert np.array_equal(blue[..., 3], picture[..., 3])
    weights = blue[..., 3:].astype(float)
    red, _, more = (blue[..., :3] * weights).sum(axis=(0, 1)) / weights.sum()
    assert more > red + 50


def test_backgrounds_and_names():
    assert "blue" not in visible_backgrounds("cat", "noto", "blue") and "yellow" in visible_backgrounds("cat", "noto", "blue")
    assert np.allclose(paint_background("red", (0, 0, 0), 0.0), COLOURS["red"])
    with pytest.raises(ValueError, match="style 'oil' unknown; choose noto, twemoji, fluent"):
        known("style", "oil", STYLES)
