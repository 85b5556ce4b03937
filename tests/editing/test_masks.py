"""Masks: read from pictures, cells, growth, the feather's closed form, and a paste that keeps the rest bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.editing.masks import cover_cells, feather, grow_small_mask, load_mask, mask_box, paste, to_cells
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from tests.editing.small import left_half, picture


def spot(*places, side=16):
    mask = torch.zeros(1, 1, side, side)
    for y, x in places:
        mask[..., y, x] = 1
    return mask


def test_white_is_repainted_from_half_grey_on(tmp_path):
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == [[[[0, 0], [1, 1]]]]
    Image.fromarray(np.array([[0, 32767], [32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert load_mask(tmp_path / "deep.png").tolist() == [[[[0, 0], [1, 1]]]]


def test_what_is_transparent_is_repainted(tmp_path):
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[0, 1, 3], rgba[1, 0, 3] = 0, 100
    Image.fromarray(rgba).save(tmp_path / "erased.png")
    assert load_mask(tmp_path / "erased.png").tolist() == [[[[0, 1], [1, 0]]]]
    rgba[..., 3], rgba[0, :, :3] = 255, 0
    Image.fromarray(rgba).save(tmp_path / "opaque.png")  # alpha says nothing, so its brightness does
    assert load_mask(tmp_path / "opaque.png").tolist() == [[[[0, 0], [1, 1]]]]


def test_a_mask_that_is_not_there_or_no_picture_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="mask.png: no such picture"):
        load_mask(tmp_path / "mask.png")
    (tmp_path / "mask.png").write_text("white")
    with pytest.raises(ValueError, match="mask.png: not a picture that can be read"):
        load_mask(tmp_path / "mask.png")


def test_a_cell_is_repainted_if_any_of_its_pixels_is():
    cells = to_cells(spot((0, 0), (7, 7), (8, 15)), 8)
    assert cells.tolist() == [[[[1, 0], [0, 1]]]]
    assert torch.equal(cover_cells(spot((0, 0)), 8), torch.kron(torch.tensor([[1.0, 0], [0, 0]]), torch.ones(8, 8))[None, None])
    assert torch.equal(cover_cells(left_half(), 4), left_half())


def test_a_mask_smaller_than_a_cell_is_grown_and_that_is_told():
    grown, note = grow_small_mask(spot((3, 4), (3, 5)), 4)
    assert mask_box(grown) == (4, 0, 8, 4)
    assert note == "the mask is 2 x 1 pixels, less than a latent cell; grown to 4 x 4"
    same, note = grow_small_mask(left_half(), 4)
    assert note is None and torch.equal(same, left_half())


@pytest.mark.parametrize("width", [0, 1, 4])
def test_the_feather_falls_evenly_with_the_distance(width):
    alpha = feather(spot((8, 8), side=17), width)
    y, x = torch.meshgrid(torch.arange(17), torch.arange(17), indexing="ij")
    distance = torch.maximum((y - 8).abs(), (x - 8).abs())
    torch.testing.assert_close(alpha[0, 0], (1 - distance / (width + 1)).clamp(min=0))


def test_a_feather_below_0_is_refused():
    with pytest.raises(ValueError, match="feather -1: give 0 pixels or more"):
        feather(left_half(), -1)


def test_pasted_bytes_beyond_the_feather_are_the_originals():
    original = picture()
    made = torch.rand_like(original) * 2 - 1
    (pasted,) = to_images(paste(original, made, feather(left_half(), 4)))
    (before,) = to_images(original)
    assert np.array_equal(np.asarray(pasted)[:, 20:], np.asarray(before)[:, 20:])
    assert torch.equal(to_pixels(np.array(before)[None]), original)
    assert np.array_equal(np.asarray(pasted)[:, :16], np.asarray(to_images(made)[0])[:, :16])
    between = (paste(original, made, feather(left_half(), 4)) - original)[..., 16:20] / (made - original)[..., 16:20]
    torch.testing.assert_close(between[0, 0, 0], torch.tensor([0.8, 0.6, 0.4, 0.2]), rtol=1e-3, atol=1e-3)
