"""Ratios of rounds and their intervals, against what can be worked out exactly."""

from math import comb

import numpy as np
import pytest

from minidiff.bench.ratios import DRAWS, Ratio, ratio, turns


def test_the_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_the_medians():
    # ratios 3, 2, 1/5: their median is 2, while the medians are 3 and 2
    assert ratio([3.0, 4.0, 1.0], [1.0, 2.0, 5.0]).median == 2.0


def test_a_machine_that_slows_for_a_while_does_not_move_the_ratio():
    slow = (1.0, 1.0, 5.0, 5.0, 1.0)
    assert ratio([3 * s for s in slow], [2 * s for s in slow]) == Ratio(1.5, 1.5, 1.5)


def test_two_rounds_give_their_whole_range():
    # Of two draws both are the smaller one with probability 1/4, more than the 2.5 % that the interval leaves out.
    found = ratio([1.0, 3.0], [1.0, 1.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.00 [1.00, 3.00]" and str(ratio([1.0], [2.0])) == "0.50 [0.50, 0.50]"


@pytest.mark.parametrize("n", [5, 11, 25])
def test_the_interval_is_that_of_the_bootstraps_exact_distribution(n):
    """The median of n draws (n odd) is at most the k-th smallest value if at least (n + 1) / 2 of the draws are: a binomial tail."""
    ratios = np.random.default_rng(n).permutation(np.arange(1.0, n + 1)).tolist()
    at_most = [sum(comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range((n + 1) // 2, n + 1)) for k in range(n + 1)]
    found = ratio(ratios, [1.0] * n)
    # Ten thousand draws estimate a share of 2.5 % to 0.16 % (one standard deviation); three of them either way are allowed.
    slack = 3 * (0.025 * 0.975 / DRAWS) ** 0.5
    for value, share in ((found.low, 0.025), (found.high, 0.975)):
        assert at_most[round(value) - 1] - slack <= share <= at_most[round(value)] + slack


def test_rounds_that_do_not_pair_up_are_refused():
    for theirs, ours in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="ratios need the same rounds of both"):
            ratio(theirs, ours)


def test_everyone_has_one_turn_a_round_in_an_order_that_changes():
    names = ["a", "b", "c", "d"]
    order = list(turns(names, 20))
    rounds = [[name for i, name in order if i == number] for number in range(20)]
    assert all(sorted(one) == names for one in rounds) and len({tuple(one) for one in rounds}) > 5
    assert {one[0] for one in rounds} == set(names)
    assert order == list(turns(names, 20)) != list(turns(names, 20, seed=1))
