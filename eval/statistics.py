"""Compute intervals and paired tests for accuracies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, rankdata
from scipy.stats import t as student

RESAMPLES, SEED = 2000, 0
RUINED = 0.05  # settings that are worse than vanilla with a smaller p are not candidates


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy."""
    if n < 1:
        raise ValueError("an accuracy needs at least one item")
    interval = binomtest(int(right), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float]:
    """Return the items that became right, those that became wrong, and the exact two-sided p of that imbalance."""
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return gained, lost, float(p)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p of a mean paired difference: how often random signs give one as large."""
    values = np.asarray(differences, float)
    signs = np.random.default_rng(SEED).choice((-1.0, 1.0), (RESAMPLES, len(values)))
    as_large = np.abs(signs @ values) >= abs(values.sum()) - 1e-12
    return float((as_large.sum() + 1) / (RESAMPLES + 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values for how many there are, so that the chance of rejecting any true null stays bounded."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, over resampled items."""
    values = np.asarray(values, float)
    low, high = np.percentile([values[drawn].mean() for drawn in _resamples(len(values))], (2.5, 97.5))
    return float(low), float(high)


def paired_bootstrap(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference of two methods on the same items, with its 95 % interval. Items are drawn with both outcomes."""
    differences = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    return (sum(differences) / len(differences), *bootstrap(differences))


def crossed_bootstrap(runs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over runs on the same items, with its 95 % interval: runs and items are drawn anew, each with replacement."""
    low, high = np.percentile(_crossed_means(runs), (2.5, 97.5))
    return float(np.mean(runs)), float(low), float(high)


def crossed_p(runs: Sequence[Sequence[float]]) -> float:
    """Return the two-sided p of a mean over runs on the same items: twice the share of the resamples on the other side of 0."""
    means = _crossed_means(runs)
    beyond = min((means <= 1e-12).sum(), (means >= -1e-12).sum())
    return min(1.0, float(2 * (beyond + 1) / (RESAMPLES + 1)))


def _crossed_means(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mean of every resample of runs and items.

    Drawing R runs with replacement shows only (R - 1) / R of the variance between them, so they are first moved apart by as much.
    """
    values = np.asarray(runs, float)
    n_runs, n_items = values.shape
    mean = values.mean(0)
    values = mean + (values - mean) * math.sqrt(n_runs / max(1, n_runs - 1))
    generator = np.random.default_rng(SEED)
    items = generator.multinomial(n_items, np.full(n_items, 1 / n_items), RESAMPLES) / n_items
    drawn = generator.multinomial(n_runs, np.full(n_runs, 1 / n_runs), RESAMPLES) / n_runs
    return ((items @ values.T) * drawn).sum(1)


def resampled_ratios(totals: Sequence[float], counts: Sequence[float]) -> np.ndarray:
    """Return sum(totals) / sum(counts) in every resample. Lists of equal length share their resamples, so their difference is a paired one."""
    totals, counts = np.asarray(totals, float), np.asarray(counts, float)
    with np.errstate(invalid="ignore"):  # nan where nothing is counted
        return np.array([totals[drawn].sum() / counts[drawn].sum() for drawn in _resamples(len(totals))])


def _resamples(n: int) -> Iterator[np.ndarray]:
    """Yield RESAMPLES draws of n indices with replacement, one at a time: for many items, all would not fit into memory."""
    generator = np.random.default_rng(SEED)
    return (generator.integers(0, n, n) for _ in range(RESAMPLES))


def spearman(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the rank correlation of two lists of values for the same items, with its 95 % interval over resampled items.

    Where all values are equal there is no order, and the correlation is 0.
    """
    both = np.array([a, b], float)
    draws = np.stack([*_resamples(both.shape[1])])
    low, high = np.percentile(_rank_correlation(*both[:, draws]), (2.5, 97.5))
    return float(_rank_correlation(*both)), float(low), float(high)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ranks = [rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (a, b)]
    spread = np.sqrt(np.prod([np.square(one).sum(-1) for one in ranks], axis=0))
    return np.divide((ranks[0] * ranks[1]).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)


def paired_gain(gained: int, lost: int, n: int) -> tuple[float, float, float]:
    """Return `paired_bootstrap` of right and wrong: drawing items is drawing how many of each kind, which costs nothing."""
    shares = [gained / n, lost / n, max(0.0, 1 - (gained + lost) / n)]
    draws = np.random.default_rng(SEED).multinomial(n, shares, RESAMPLES)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, (2.5, 97.5))
    return (gained - lost) / n, float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the mean of few values, such as the gains of training seeds, its 95 % interval, and the two-sided p of a mean of 0."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError("an interval of a mean needs at least two values")
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    half = student.ppf(0.975, len(values) - 1) * error
    p = 2 * student.sf(abs(mean) / error, len(values) - 1) if error else float(mean == 0)
    return float(mean), float(mean - half), float(mean + half), float(p)


@dataclass(frozen=True)
class Noise:
    mean: float  # what choosing alone brings on average
    quantile: float  # what it exceeds once in twenty times
    kept: int  # number of settings that were candidates


def selection_noise(outcomes_by_setting: dict[str, Sequence[bool]], vanilla: Sequence[bool]) -> Noise:
    """Return how much the best of these settings would gain over vanilla, on the items it was chosen on, if none were better.

    Each setting's differences to vanilla are shifted to a mean of zero, which makes that true; then items are drawn
    anew, the same for all settings, so that settings which err alike still do; and the best mean is taken.

    A setting that ruins the model differs from vanilla on nearly all items. Shifted to zero it would have the largest
    variance of all and win most draws, which it never does in truth. So settings that are significantly worse (McNemar's
    exact test, p < RUINED) are left out.
    """
    candidates = [outcomes for outcomes in outcomes_by_setting.values() if not _ruined(vanilla, outcomes)]
    if not candidates:
        return Noise(0.0, 0.0, 0)
    base = np.asarray(vanilla, float)
    gains = np.array([np.asarray(outcomes, float) - base for outcomes in candidates])
    gains -= gains.mean(1, keepdims=True)
    n = len(base)
    # drawing n items with replacement is the same as drawing how often each is drawn
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    best = (counts @ gains.T / n).max(1)
    return Noise(float(best.mean()), float(np.percentile(best, 95)), len(candidates))


def _ruined(vanilla: Sequence[bool], outcomes: Sequence[bool]) -> bool:
    gained, lost, p = mcnemar(vanilla, outcomes)
    return lost > gained and p < RUINED


def summary(columns: dict[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return for each measure its mean, its 95 % interval (Wilson for right or wrong, else bootstrap) and n."""
    measures = {}
    for name, values in columns.items():
        share = all(isinstance(value, bool) for value in values)
        low, high = wilson(sum(values), len(values)) if share else bootstrap(values)
        measures[name] = {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}
    return measures
