"""Intervals and tests against scipy's own and against sums by hand."""

import math

import pytest
from scipy.stats import binomtest

from eval.statistics import mcnemar, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 1), (5, 12), (1676, 2000), (270, 355)])
def test_wilson(right, n):
    wanted = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_needs_items():
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_mcnemar_by_hand():
    before = [True] * 5 + [False] * 7
    after = [True] * 4 + [False] + [True] * 6 + [False]
    gained, lost, p = mcnemar(before, after)
    by_hand = 2 * sum(math.comb(7, i) for i in range(2)) / 2**7
    assert (gained, lost) == (6, 1) and p == pytest.approx(by_hand)
    assert mcnemar(before, before) == (0, 0, 1.0)
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])
