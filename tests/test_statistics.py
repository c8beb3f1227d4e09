"""Intervals and tests against scipy's own and against sums by hand."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics import bootstrap, holm, mcnemar, sign_flip, summary, wilson


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


def test_holm_equals_the_plain_rule():
    ps = [0.04, 0.001, 0.03, 0.9]
    assert holm(ps) == pytest.approx([0.09, 0.004, 0.09, 0.9]) and holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert bootstrap([2.0]) == (2.0, 2.0)


def test_summary():
    found = summary({"right": [True, False, True, True], "score": [1.0, 1.0]})
    assert found["right"] == {"value": 0.75, "low": wilson(3, 4)[0], "high": wilson(3, 4)[1], "n": 4}
    assert found["score"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}


def test_sign_flip_is_about_the_t_test():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(1).normal(0.15, 1, 300)
    assert sign_flip(values) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.03)
    assert sign_flip([0.0] * 9) == 1.0 and sign_flip([1.0] * 40) < 0.001
