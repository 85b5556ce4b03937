"""The canvas: three ways to a size, borders, crops that come back to their place, and whole cells for any size."""

import pytest
import torch

from minidiff.editing.canvas import Crop, crop_around, fit, make_canvas, outpaint, pad_to_cells, read_sides, resize, usual_size
from minidiff.editing.masks import feather, mask_box
from tests.editing.small import left_half, picture


def ramp(height: int, width: int) -> torch.Tensor:
    """Pixels that say their place: channel 0 rises to the right, channel 1 downward."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])[None]


@pytest.mark.parametrize("size, expected", [((64, 64), (64, 64)), ((300, 200), (96, 64)), ((200, 300), (64, 96)), ((1000, 10), (6400, 64))])
def test_the_usual_size_has_the_models_shorter_side_and_whole_cells(size, expected):
    assert usual_size(*size, 64, 4) == expected


@pytest.mark.parametrize("how", ["crop", "resize", "pad"])
def test_every_fit_gives_the_size_and_leaves_a_picture_of_that_size_as_it_is(how):
    assert fit(ramp(30, 50), 24, 40, how).shape == (1, 3, 40, 24)
    assert torch.equal(fit(picture(), 32, 32, how), picture())


def test_crop_keeps_the_middle_resize_all_and_pad_all_undistorted():
    wide = ramp(32, 64)
    cropped, resized, padded = (fit(wide, 32, 32, how) for how in ("crop", "resize", "pad"))
    assert torch.equal(cropped, wide[..., 16:48])
    assert resized[0, 0, 0, 0] < -0.95 and resized[0, 0, 0, -1] > 0.95
    inner = padded[..., 8:24, :]
    torch.testing.assert_close(inner, resize(wide, 32, 16))
    assert torch.equal(padded[..., :8, :], inner[..., :1, :].expand(1, 3, 8, 32))
    assert torch.equal(padded[..., 24:, :], inner[..., -1:, :].expand(1, 3, 8, 32))


def test_resizing_stays_within_the_pictures_range():
    edges = torch.zeros(1, 1, 8, 8)
    edges[..., 4:] = 1
    large = resize(edges, 31, 31)
    assert large.min() >= 0 and large.max() <= 1


def test_another_fit_is_refused():
    with pytest.raises(ValueError, match="fit 'squeeze' unknown; choose crop, resize, pad"):
        fit(picture(), 8, 8, "squeeze")


def test_any_size_is_padded_to_whole_cells_by_its_last_pixels():
    padded = pad_to_cells(picture(0, 30, 33), 4)
    assert padded.shape == (1, 3, 32, 36)
    assert torch.equal(padded[..., :30, :33], picture(0, 30, 33)) and torch.equal(padded[..., 31, 35], padded[..., 29, 32])


def test_sides_are_read():
    assert read_sides("left=64, top=0,bottom=8") == {"left": 64, "top": 0, "bottom": 8}


@pytest.mark.parametrize("text", ["64", "left", "left=-3", "left=6.5", "up=3", "left=3,left=4", "left=3,,", ""])
def test_sides_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is no side with its pixels; write left=64,right=64,top=32,bottom=32"):
        read_sides(text)
    with pytest.raises(ValueError, match="outpaint 'top=0' adds no pixel"):
        read_sides("top=0")


def test_outpainting_stretches_the_edges_and_masks_the_border():
    pixels, mask = outpaint(picture(), {"left": 8, "bottom": 4})
    assert pixels.shape == (1, 3, 36, 40) and mask_box(1 - mask) == (8, 0, 40, 32)
    assert torch.equal(pixels[..., :32, 8:], picture()) and torch.equal(pixels[..., 5, 0], picture()[..., 5, 0])
    _, both = outpaint(picture(), {"left": 8}, left_half())
    assert mask_box(both) == (0, 0, 24, 32)


def test_the_crop_around_a_mask_has_its_margin_the_asked_shape_and_stays_inside():
    mask = torch.zeros(1, 1, 100, 200)
    mask[..., 40:60, 90:110] = 1
    assert crop_around(mask, 64, 64) == Crop(85, 35, 30, 30)
    assert crop_around(mask, 128, 64) == Crop(64, 32, 72, 36)
    corner = torch.zeros(1, 1, 100, 200)
    corner[..., 90:, 190:] = 1
    assert crop_around(corner, 64, 64) == Crop(182, 82, 18, 18)
    tall = torch.zeros(1, 1, 100, 200)
    tall[..., 5:95, 0:2] = 1
    assert crop_around(tall, 64, 64) == Crop(0, 0, 134, 100)  # as far as the picture reaches


def test_a_part_comes_back_to_its_place():
    original = ramp(50, 60)
    crop = Crop(10, 20, 24, 16)
    assert torch.equal(crop.put_back(crop.cut(original), original), original)
    grey = crop.put_back(torch.zeros(2, 3, 32, 48), original)
    assert torch.equal(grey[0] == 0, grey[1] == 0) and mask_box((grey[:1, :1] == 0).float()) == (10, 20, 34, 36)


def test_a_whole_canvas_is_padded_and_cut_again():
    mask = torch.zeros(1, 1, 30, 33)
    mask[..., :10, :10] = 1
    canvas = make_canvas(picture(0, 30, 33), mask, 4)
    assert canvas.pixels.shape == (1, 3, 32, 36) and canvas.mask.shape == (1, 1, 32, 36)
    assert torch.equal(canvas.alpha, feather(mask, 4))  # a latent cell
    done = canvas.finish(torch.zeros(2, 3, 32, 36))
    assert done.shape == (2, 3, 30, 33)
    assert torch.equal(done[..., 14:, :], picture(0, 30, 33)[..., 14:, :].expand(2, -1, -1, -1)) and not done[..., :10, :10].any()


def test_a_canvas_of_the_masked_part_works_at_its_own_size():
    mask = torch.zeros(1, 1, 100, 200)
    mask[..., 40:60, 90:110] = 1
    canvas = make_canvas(picture(0, 100, 200), mask, 4, size=(64, 64))
    assert canvas.pixels.shape == (1, 3, 64, 64) and canvas.crop == Crop(85, 35, 30, 30)
    assert torch.equal(canvas.alpha, feather(mask, 2))  # a latent cell, as large as it is in the picture
    done = canvas.finish(torch.zeros(1, 3, 64, 64))
    assert not done[..., 40:60, 90:110].any()
    outside = feather(mask, 2) == 0
    assert torch.equal(done[outside.expand_as(done)], picture(0, 100, 200)[outside.expand_as(done)])


def test_sizes_without_pixels_and_borders_without_end_are_refused():
    for how in ("crop", "resize", "pad"):
        with pytest.raises(ValueError, match="size 0 x 8 has no pixels; give at least 1 a side"):
            fit(picture(), 0, 8, how)
    for border in (10**7, 10**23):
        with pytest.raises(ValueError, match=rf"outpaint makes {32 + border} x 32 pixels of 32 x 32; at most 64 megapixels"):
            outpaint(picture(), {"left": border})


def test_masks_of_one_value_and_a_feather_below_0_are_refused():
    with pytest.raises(ValueError, match="all black"):
        make_canvas(picture(), torch.zeros(1, 1, 32, 32), 4)
    with pytest.raises(ValueError, match="feather -2"):
        make_canvas(picture(), left_half(), 4, feather_width=-2)
