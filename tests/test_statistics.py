"""Intervals and tests against scipy's own and against sums by hand."""

import doctest
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, norm, spearmanr

from eval.statistics import (
    bootstrap,
    crossed_bootstrap,
    crossed_p,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_gain,
    resampled_ratios,
    selection_noise,
    sign_flip,
    spearman,
    summary,
    t_interval,
    wilson,
)


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


def test_ratios_are_of_sums_and_paired():
    draw = np.random.default_rng(5)
    tokens = draw.integers(1, 30, 400)
    totals = tokens * 2.0 + draw.normal(0, 3, 400)
    ratios = resampled_ratios(totals, tokens)
    residual = totals - tokens * totals.sum() / tokens.sum()  # the delta method's spread of a ratio
    assert ratios.std() == pytest.approx(residual.std() / tokens.mean() / 400**0.5, rel=0.1)
    assert ratios.mean() == pytest.approx(totals.sum() / tokens.sum(), abs=0.02)
    assert resampled_ratios(totals + 0.5 * tokens, tokens) - ratios == pytest.approx(np.full(len(ratios), 0.5))
    assert np.isnan(resampled_ratios([0.0, 0.0], [0, 0])).all()


def test_paired_bootstrap_is_that_of_the_differences():
    rng = np.random.default_rng(2)
    before = rng.random(800) < 0.6
    after = np.where(rng.random(800) < 0.1, ~before, before)
    gain, low, high = paired_bootstrap(before.tolist(), after.tolist())
    differences = after.astype(float) - before
    assert gain == pytest.approx(differences.mean()) and low < gain < high
    assert (high - low) / 2 == pytest.approx(1.96 * differences.std() / 800**0.5, rel=0.08)
    unpaired = 1.96 * (before.var() / 800 + after.var() / 800) ** 0.5
    assert (high - low) / 2 < 0.6 * unpaired  # what pairing is for
    assert paired_bootstrap([True, False], [True, False]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError):
        paired_bootstrap([True], [True, False])


def expected_largest_of_normals(k):
    grid = np.linspace(-8, 8, 20001)
    cdf = norm.cdf(grid) ** k
    return float(((grid[1:] + grid[:-1]) / 2 * np.diff(cdf)).sum())


@pytest.mark.parametrize("k", [2, 25])
def test_selection_noise_of_unlike_settings_is_the_largest_of_normals(k):
    """Its truth, by simulation: the mean gain of best over vanilla where nothing is better, over fresh data sets."""
    rng, n, share = np.random.default_rng(5), 600, 0.75
    error = (share * (1 - share) / n) ** 0.5
    made = [rng.random((k + 1, n)) < share for _ in range(20)]
    found = [selection_noise({str(i): row for i, row in enumerate(rows)}, v) for v, *rows in made[:4]]
    noise = np.mean([one.mean for one in found])
    assert noise == pytest.approx(expected_largest_of_normals(k) * error, rel=0.1)
    fresh = rng.binomial(n, share, (4000, k + 1)) / n
    gains = fresh[:, 1:].max(1) - fresh[:, 0]
    assert noise == pytest.approx(gains.mean(), rel=0.1)
    assert np.mean([one.quantile for one in found]) == pytest.approx(np.percentile(gains, 95), rel=0.1)
    # a true gain of a setting is no noise
    better = {"a": np.ones(n, bool), **{str(i): row for i, row in enumerate(made[0][2:])}}
    assert selection_noise(better, made[0][0]).mean < 1.2 * expected_largest_of_normals(k) * error


def test_selection_noise_of_like_settings():
    rng = np.random.default_rng(6)
    vanilla = (rng.random(500) < 0.7).tolist()
    assert selection_noise({str(i): vanilla for i in range(30)}, vanilla).mean == 0  # nothing to choose from
    other = (rng.random(500) < 0.7).tolist()
    assert selection_noise({str(i): other for i in range(30)}, vanilla).mean == pytest.approx(0, abs=2e-3)
    unlike = {str(i): rng.random(500) < 0.7 for i in range(30)}
    near = {str(i): np.where(rng.random(500) < 0.02, rng.random(500) < 0.7, vanilla) for i in range(30)}
    assert 0 < selection_noise(near, vanilla).mean < 0.35 * selection_noise(unlike, vanilla).mean
    assert selection_noise(near, vanilla) == selection_noise(near, vanilla)


def test_a_ruined_setting_is_no_candidate():
    """Shifted to zero, what answers nearly everything wrong varies most of all, and would win most draws."""
    rng = np.random.default_rng(7)
    vanilla = rng.random(500) < 0.8
    near = {str(i): np.where(rng.random(500) < 0.05, rng.random(500) < 0.8, vanilla) for i in range(14)}
    alone = selection_noise(near, vanilla)
    assert alone.kept == 14 and 0 < alone.mean < alone.quantile
    assert selection_noise({**near, "ruined": rng.random(500) < 0.02}, vanilla) == alone
    assert selection_noise({"ruined": ~vanilla}, vanilla).kept == 0
    better = {**near, "better": np.ones(500, bool)}
    assert selection_noise(better, vanilla).kept == 15, "only what is worse is left out"


def test_paired_gain_is_the_paired_bootstrap_of_right_and_wrong():
    before, after = [True] * 70 + [False] * 30, [True] * 68 + [False] * 2 + [True] * 12 + [False] * 18
    gained, lost, _ = mcnemar(before, after)
    assert paired_gain(gained, lost, 100) == pytest.approx(paired_bootstrap(before, after), abs=0.011)
    assert paired_gain(0, 0, 50) == (0.0, 0.0, 0.0)


def test_t_interval_equals_scipys():
    from scipy.stats import ttest_1samp

    gains = [12.7, 2.8, 0.5, 0.0, 0.0]
    wanted = ttest_1samp(gains, 0)
    interval = wanted.confidence_interval(0.95)
    assert t_interval(gains) == pytest.approx((3.2, interval.low, interval.high, wanted.pvalue))
    assert t_interval([0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0) and t_interval([2.0, 2.0]) == (2.0, 2.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="at least two"):
        t_interval([1.0])


def test_the_document_shows_what_the_code_does():
    text = (Path(__file__).parents[1] / "docs" / "statistics.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 8 and all(">>>" in block for block in blocks)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "docs/statistics.md", None, 0)
    said = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried > 20 and not failed, "".join(said)


def test_spearman_against_scipy_and_a_plain_loop():
    rng = np.random.default_rng(3)
    a = rng.integers(0, 8, 40).astype(float)  # with ties
    b = a + rng.normal(0, 4, 40)
    rho, low, high = spearman(a, b)
    assert rho == pytest.approx(spearmanr(a, b).statistic) and low < rho < high
    draws = np.random.default_rng(0).integers(0, 40, (2000, 40))
    expected = np.percentile([spearmanr(a[draw], b[draw]).statistic for draw in draws], (2.5, 97.5))
    assert (low, high) == pytest.approx(tuple(expected))
    assert spearman(a, -a)[0] == pytest.approx(-1) and spearman(a, np.ones(40)) == (0, 0, 0), "no order, no correlation"


def test_runs_and_items_are_drawn_anew():
    apart = crossed_bootstrap([[2.0] * 10, [4.0] * 10, [6.0] * 10])  # all of the noise is between runs
    spread = (
        2 * 1.5**0.5
    )  # of three runs drawn with replacement all are the lowest once in 27 draws, moved apart by 3 / 2
    assert apart == pytest.approx((4, 4 - spread, 4 + spread))
    assert crossed_bootstrap([[1.0, 0.0] * 50]) == pytest.approx((0.5, 0.4, 0.6), abs=0.02), (
        "a single run is drawn as it is"
    )
    alike = crossed_bootstrap([[0.0, 1.0] * 50] * 3)  # all of it is between items
    assert alike == pytest.approx((0.5, 0.4, 0.6), abs=0.02)


def test_p_over_runs_and_items_goes_with_the_interval():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.3):
        runs = rng.normal(shift, 1, (4, 60)) + rng.normal(0, 0.1, (4, 1))
        _, low, high = crossed_bootstrap(runs)
        assert (crossed_p(runs) < 0.05) == (low > 0 or high < 0)
        assert crossed_p(runs) == crossed_p(-runs)
    assert crossed_p([[0.0] * 10] * 3) == 1.0 and crossed_p([[1.0] * 10] * 3) == pytest.approx(2 / 2001)
