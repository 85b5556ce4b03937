"""KID: against sums written as loops, against the moments of known distributions, and its error against what repeating shows."""

import itertools

import pytest
import torch

from minidiff.evaluation.kid import block_sums, kernel, kid


def by_loops(x, y):
    """The definition, pair by pair."""
    k = lambda a, b: (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3
    x, y = x.tolist(), y.tolist()
    within = [sum(k(a, b) for a, b in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1)) for rows in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within[0] + within[1] - 2 * across


def normals(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("blocks", [2, 5])
def test_kid_is_the_definition_also_for_sets_of_unequal_size(blocks):
    x, y = normals(11, 4, seed=0), normals(14, 4, seed=1) + 0.5
    assert kid(x, y, blocks=blocks).value == pytest.approx(by_loops(x, y), rel=1e-12)  # float64, sums in another order


def test_the_error_is_the_jackknifes_over_blocks():
    x, y = normals(9, 3, seed=2), normals(10, 3, seed=3)
    left_out = [by_loops(x[torch.arange(9) % 3 != i], y[torch.arange(10) % 3 != i]) for i in range(3)]
    mean = sum(left_out) / 3
    expected = (2 / 3 * sum((value - mean) ** 2 for value in left_out)) ** 0.5
    assert kid(x, y, blocks=3).error == pytest.approx(expected, rel=1e-9)  # float64; differences of the estimates lose some digits


def test_on_numbers_kid_is_the_distance_of_the_first_three_moments():
    # D = 1: (x y + 1)^3 = 1 + 3 xy + 3 x^2 y^2 + x^3 y^3, so mmd^2 = 3 (m1 - n1)^2 + 3 (m2 - n2)^2 + (m3 - n3)^2.
    # x is -1 or 1, y is 0 or 1, each half the time: moments 0, 1, 0 and all 1/2.
    expected = 3 * (0 - 0.5) ** 2 + 3 * (1 - 0.5) ** 2 + (0 - 0.5) ** 2
    rng = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(2, (10, 1), generator=rng).double()
    found = torch.tensor([kid(2 * draw() - 1, draw(), blocks=2).value for _ in range(200)])
    # Unbiased at 10 draws each: the mean of 200 estimates lies within 4 of its standard errors (1 in 16,000 does not).
    assert (found.mean() - expected).abs() < 4 * found.std() / 200**0.5
    # The biased estimate, with the diagonal, would be off by (mean k(x,x) - mean k(x,x')) / 20 and the same of y, (8 - 4 + 4.5 - 2.75) / 10.
    assert 4 * found.std() / 200**0.5 < 0.575


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_error_is_about_what_repeating_shows(shift):
    estimates = [kid(normals(200, 8, seed=2 * i), normals(200, 8, seed=2 * i + 1) + shift) for i in range(50)]
    spread = torch.tensor([estimate.value for estimate in estimates]).std()
    stated = torch.tensor([estimate.error for estimate in estimates]).mean()
    # The spread of 50 draws is known to 10 %, and a jackknife over 20 blocks to 16 % each time. Where both sets are alike the estimate is a
    # degenerate U-statistic, whose variance the jackknife doubles (Efron and Stein 1981): the error is then up to 1.41 times too large, never too small.
    assert 0.8 < stated / spread < (1.7 if shift == 0 else 1.25)


def test_pairs_within_a_group_are_left_out():
    x, y, groups = normals(8, 3, seed=0), normals(8, 3, seed=1), torch.arange(8) // 2
    k = kernel(torch.cat([x, y]), torch.cat([x, y])).tolist()
    pairs = [(i, j) for i in range(8) for j in range(8) if i // 2 != j // 2]
    expected = sum(k[i][j] + k[8 + i][8 + j] - 2 * k[i][8 + j] for i, j in pairs) / len(pairs)
    assert kid(x, y, groups=(groups, groups), blocks=2).value == pytest.approx(expected, rel=1e-12)  # float64


def test_sets_of_the_same_prompts_are_as_far_apart_as_they_are():
    # Each of 50 prompts has pictures around a place of its own, two in either set; the sets differ in nothing.
    group = torch.arange(50).repeat(2)
    plain, grouped = [], []
    for seed in range(40):
        prompts = normals(50, 4, seed=3 * seed)[group]
        x, y = (prompts + 0.3 * normals(100, 4, seed=3 * seed + k) for k in (1, 2))
        plain.append(kid(x, y).value)
        grouped.append(kid(x, y, groups=(group, group)))
    values = torch.tensor([estimate.value for estimate in grouped])
    spread = values.std()
    assert values.mean().abs() < 4 * spread / 40**0.5  # four standard errors of the mean
    assert torch.tensor(plain).mean() < -10 * spread / 40**0.5
    assert 0.8 < torch.tensor([estimate.error for estimate in grouped]).mean() / spread < 1.7  # as above, alike sets


def test_alike_sets_are_near_zero_and_the_order_of_the_sets_does_not_matter():
    x, y = normals(300, 8, seed=5), normals(300, 8, seed=6)
    near = kid(x, y)
    assert abs(near.value) < 4 * near.error
    assert kid(y, x).value == pytest.approx(near.value, abs=1e-12)  # float64 sums of numbers near 1
    far = kid(x, y + 1)
    assert far.value > 10 * far.error


def test_the_kernel_is_worked_out_in_float64():
    x = normals(3, 5, seed=7).float()
    assert kernel(x, x).dtype == torch.float64


def test_block_sums_add_up_to_the_sum():
    pairs = normals(5, 7, seed=8)
    sums = block_sums(pairs, torch.arange(5) % 2, torch.arange(7) % 2, 2)
    assert sums[1, 0] == pytest.approx(pairs[1::2, 0::2].sum().item(), rel=1e-12)
    assert sums.sum() == pytest.approx(pairs.sum().item(), rel=1e-12)


def test_sets_that_have_no_kid_are_refused():
    x = torch.zeros(40, 3)
    with pytest.raises(ValueError, match="features of width 3 and 4"):
        kid(x, torch.zeros(40, 4))
    with pytest.raises(ValueError, match=r"40 and 30 pictures \(or groups of them\) in 20 blocks"):
        kid(x, torch.zeros(30, 3))
    with pytest.raises(ValueError, match="in 1 blocks; give 2"):
        kid(x, x, blocks=1)
    with pytest.raises(ValueError, match="not finite"):
        kid(x, torch.full((40, 3), torch.nan))
