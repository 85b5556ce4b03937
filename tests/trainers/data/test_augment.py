"""Custom Diffusion's sizes: what is drawn, where it is pasted, what counts and what is said."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.pictures import fit
from minidiff.trainers.data.augment import CODE_SIZES, PAPER_SIZES, SCENE_SIZES, SizeAugmentation, sized_view, valid_cells

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 127, (90, 70, 3), np.uint8))  # nowhere as bright as the grey around it
SIZE, FACTOR = 64, 4
SIZES = {"paper": PAPER_SIZES, "code": CODE_SIZES}


def views(augmentation, count=300):
    for seed in range(count):
        yield (
            augmentation.draw_side(SIZE, np.random.default_rng(seed)),
            sized_view(IMAGE, SIZE, FACTOR, augmentation, np.random.default_rng(seed)),
        )  # the same generator: the side is drawn first


@pytest.mark.parametrize("kind", SIZES)
def test_a_smaller_picture_stands_whole_on_grey(kind):
    for side, view in views(SIZES[kind]):
        if side >= SIZE:
            continue
        rows, columns = (np.flatnonzero((view.pixels != 0).any(0).any(axis)) for axis in (1, 0))
        top, left = rows[0], columns[0]
        assert len(rows) == len(columns) == side
        assert torch.equal(view.pixels[:, top : top + side, left : left + side], fit(IMAGE, side))


@pytest.mark.parametrize("kind", SIZES)
def test_a_larger_picture_shows_a_window_of_itself(kind):
    for side, view in views(SIZES[kind], 60):
        if side > SIZE:
            windows = fit(IMAGE, side).unfold(1, SIZE, 1).unfold(2, SIZE, 1)  # 3 y x 64 64
            assert (windows == view.pixels[:, None, None]).all(-1).all(-1).all(0).sum() == 1
            assert (view.mask == 1).all()


@pytest.mark.parametrize("top, left, side", [(8, 12, 32), (9, 14, 31), (0, 0, 64), (3, 30, 26), (37, 43, 21), (1, 2, 12)])
def test_the_mask_is_the_pasted_box_less_a_cell_around(top, left, side):
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[top : top + side, left : left + side] = True
    cells = inside.reshape(SIZE // FACTOR, FACTOR, SIZE // FACTOR, FACTOR).permute(0, 2, 1, 3).flatten(2)
    touched, whole = cells.any(-1), cells.all(-1)
    # A cell counts if all of its neighbours before it are touched by the box, and all after it lie wholly in it.
    expected = torch.zeros(1, SIZE // FACTOR, SIZE // FACTOR)
    for i in range(1, SIZE // FACTOR - 1):
        for j in range(1, SIZE // FACTOR - 1):
            expected[0, i, j] = float(touched[i - 1, j - 1] and whole[i + 1, j + 1])
    mask = valid_cells(top, left, side, SIZE, FACTOR)
    assert torch.equal(mask, expected)
    assert mask.sum() > 0 and (mask.bool() <= whole).all()


def test_the_mask_of_an_aligned_box_is_exact():
    assert valid_cells(8, 16, 32, SIZE, FACTOR).nonzero().tolist() == [[0, i, j] for i in range(3, 9) for j in range(5, 11)]


@pytest.mark.parametrize("kind", SIZES)
def test_the_mask_lies_inside_the_picture_and_is_never_empty(kind):
    for side, view in views(SIZES[kind]):
        covered = (view.pixels != 0).any(0).reshape(SIZE // FACTOR, FACTOR, SIZE // FACTOR, FACTOR).all(3).all(1)
        assert view.mask.sum() > 0 and (side >= SIZE or (view.mask[0].bool() <= covered).all())


def test_the_papers_sides_are_spread_evenly():
    sides = np.array([side for side, _ in views(PAPER_SIZES, 2000)]) / SIZE
    assert 0.39 <= sides.min() < 0.42 and 1.38 < sides.max() <= 1.41  # half a pixel of rounding beyond 0.4 and 1.4
    assert abs(sides.mean() - 0.9) < 0.02  # 3 standard errors of a uniform variable: 3 x 0.29 / sqrt(2000)


def test_the_published_programs_sides_are_drawn_as_there():
    sides = np.array([side for side, _ in views(CODE_SIZES, 2000)])
    small, whole, large = sides < 0.6 * SIZE, sides == SIZE, sides > SIZE
    assert (small | whole | large).all() and (sides % 2 == 0).all()
    assert sides.min() == 22 and sides[large].min() == 76 and sides[large].max() == 88  # 21.3, 76.8 and 89.6, whole and then even
    assert abs(large.mean() - 1 / 3) < 0.032  # 3 standard errors: 3 sqrt(2/9 / 2000)
    assert abs(small.mean() - 2 / 3 * 18 / 44) < 0.03  # 21..38 of 21..64


@pytest.mark.parametrize("kind", SIZES)
def test_the_words_follow_the_size(kind):
    said = {"small": set(), "large": set(), "": set()}
    for side, view in views(SIZES[kind]):
        said["small" if side < 0.6 * SIZE else "large" if side > SIZE else ""].add(view.size_phrase)
    assert said == {"small": set(SIZES[kind].small), "large": set(SIZES[kind].large), "": {""}}


def test_the_word_stands_in_front_or_before_the_subject():
    assert PAPER_SIZES.with_phrase("photo of a <new1> cat", "very small") == "very small photo of a <new1> cat"
    assert CODE_SIZES.with_phrase("photo of a <new1> cat", "a far away") == "a far away photo of a <new1> cat"
    inside = SizeAugmentation(small=SCENE_SIZES.small, large=SCENE_SIZES.large, before="<new1>")
    assert inside.with_phrase("a photo of a <new1> on a red background", "small") == "a photo of a small <new1> on a red background"
    assert inside.with_phrase("a cat", "small") == "small a cat"
    assert inside.with_phrase("a <new1>", "") == "a <new1>"


def test_flipping_mirrors_the_picture_where_it_stands():
    for seed in range(5):
        plain = sized_view(IMAGE, SIZE, FACTOR, CODE_SIZES, np.random.default_rng(seed))
        mirrored = sized_view(IMAGE, SIZE, FACTOR, CODE_SIZES, np.random.default_rng(seed), flip=True)
        assert torch.equal(plain.mask, mirrored.mask) and not torch.equal(plain.pixels, mirrored.pixels)
        assert torch.equal((plain.pixels != 0).any(0), (mirrored.pixels != 0).any(0))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="augmentation 'papr' unknown; choose paper, code"):
        SizeAugmentation("papr")
    with pytest.raises(ValueError, match="augmentation without phrases"):
        SizeAugmentation(small=())
    with pytest.raises(ValueError, match="augmentation: 10 of 32 pixels are less than 3 latent cells of 4"):
        CODE_SIZES.check(32, 4)
    CODE_SIZES.check(512, 8)
