"""Hints: Canny against OpenCV, the others by what they promise, and what is noticed about a picture given as a hint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.hints import KIND_KEY, canny, disk, doubts, edge_f1, inpaint, looks_like_lines, scribble, tile, to_hint


def square(size=64, side=32, inside=255, outside=0):
    picture = np.full((size, size, 3), outside, np.uint8)
    start = (size - side) // 2
    picture[start : start + side, start : start + side] = inside
    return picture


# --- canny ------------------------------------------------------------------------------------------------------------


def test_canny_is_opencvs_bit_for_bit():
    """tests/data/canny.npz: smoothed noise and scenes, with the edges that OpenCV 4.14 finds at three pairs of thresholds."""
    with np.load(Path(__file__).parent / "data" / "canny.npz") as stored:
        for i in range(int(stored["count"])):
            for low, high in stored["thresholds"]:
                expected = stored[f"edges-{i}-{low:g}-{high:g}"]
                assert expected.any() and np.array_equal(canny(stored[f"picture-{i}"], low, high)[..., 0] > 0, expected)


def test_an_edge_is_one_pixel_wide_and_closed():
    edges = canny(square())[..., 0] > 0
    assert (edges[20:44].sum(axis=1) == 2).all() and (edges[:, 20:44].sum(axis=0) == 2).all()  # both sides, each once
    assert not canny(np.full((16, 16, 3), 100, np.uint8)).any()


def test_a_picture_turned_has_its_edges_turned():
    picture = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((48, 48), 3))
    assert (
        edge_f1(canny(picture[:, ::-1])[:, ::-1], canny(picture), within=1) > 0.97
    )  # of two equal gradients the left or upper one is kept


@pytest.mark.parametrize("low, high", [(200, 100), (-1, 100)])
def test_thresholds_out_of_order_are_refused(low, high):
    with pytest.raises(ValueError, match=f"canny thresholds {low} and {high}: give 0 <= low <= high"):
        canny(square(), low, high)


def test_edge_f1_is_1_within_two_pixels_and_0_far_away():
    line, moved, far = (np.zeros((32, 32), bool) for _ in range(3))
    line[:, 10], moved[:, 12], far[:, 20] = True, True, True
    assert edge_f1(line, moved) == 1 and edge_f1(line, moved, within=1) == 0 and edge_f1(line, far) == 0
    assert edge_f1(line, line | far) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert edge_f1(line, np.zeros((32, 32), bool)) == 0 and edge_f1(far & line, far & line) == 1
    assert edge_f1(np.repeat(line[..., None], 3, 2).astype(np.uint8) * 255, line) == 1
    assert len(disk(1)) == 5 and len(disk(2)) == 13


# --- the others -------------------------------------------------------------------------------------------------------


def test_a_scribble_is_thick_and_keeps_to_the_edges():
    picture = square(170, 80)
    lines = scribble(picture)
    assert set(np.unique(lines)) == {0, 255}
    assert edge_f1(lines, canny(picture), within=3) == 1
    widths = [scribble(picture, width=width).astype(bool).sum() for width in (1, 3, 8)]
    assert widths[0] < widths[1] < widths[2]
    for width in (0, 22, 10**6):
        with pytest.raises(ValueError, match=rf"scribble width {width} is outside 1\.\.21 for a picture whose shorter side has 170 pixels"):
            scribble(picture, width=width)


def test_a_tile_keeps_means_and_loses_detail():
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    picture[:, :24] //= 2
    flat = tile(picture, 8)
    assert flat.shape == picture.shape and flat.std() < picture.std() / 2
    assert abs(flat[:, :16].mean() - picture[:, :16].mean()) < 5
    assert np.array_equal(tile(picture, 1), picture)
    with pytest.raises(ValueError, match="tile factor 49 is outside 1..48 for a picture of 48 x 64"):
        tile(picture, 49)


def test_the_hole_of_an_inpainting_hint_is_minus_1(tmp_path):
    picture, mask = square(), np.zeros((64, 64), np.uint8)
    mask[8:16, 8:24] = 255
    image = Image.fromarray(inpaint(picture, mask))
    image.info[KIND_KEY] = "inpaint"
    pixels = to_hint(image)
    assert torch.equal(pixels[0] == -1, torch.from_numpy(mask > 0))
    assert torch.equal(pixels[:, mask == 0], torch.from_numpy(picture).permute(2, 0, 1)[:, mask == 0] / 255)
    assert (to_hint(image, (32, 32))[0] == -1).sum() == 8 * 16 / 4
    del image.info[KIND_KEY]
    assert (to_hint(image)[:, mask > 0] == 1).all()  # any other transparent picture lies on white
    with pytest.raises(ValueError, match="a mask of 64 x 32 pixels for a picture of 64 x 64"):
        inpaint(picture, mask[:32])
    with pytest.raises(ValueError, match="the mask has no hole"):
        inpaint(picture, 0 * mask)


def test_a_hint_is_resized_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    theirs = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False).preprocess(image, 32, 64)
    torch.testing.assert_close(to_hint(image, (64, 32)), theirs[0].float())


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA"])
def test_pictures_of_every_mode_are_three_channels_of_0_to_1(mode):
    pixels = to_hint(Image.fromarray(square()).convert(mode))
    assert pixels.shape == (3, 64, 64) and pixels.min() == 0 and pixels.max() == 1


# --- what is noticed --------------------------------------------------------------------------------------------------


def test_black_lines_on_white_and_hints_of_hints_are_noticed():
    edges = canny(square())
    assert doubts(Image.fromarray(255 - edges)).startswith("black lines on white")
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for fine in (edges, photograph, square(inside=128), np.full((8, 8, 3), 255, np.uint8)):
        assert doubts(Image.fromarray(fine)) is None
    assert looks_like_lines(Image.fromarray(edges)) and looks_like_lines(Image.fromarray(255 - edges))
    assert not looks_like_lines(Image.fromarray(photograph)) and not looks_like_lines(Image.fromarray(square(inside=128)))
    transparent = Image.fromarray(np.dstack([0 * edges, edges[..., :1]]))  # black lines on nothing
    assert doubts(transparent)
