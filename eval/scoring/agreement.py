"""What ratings of several people say: a mean with its interval over prompts, and how far the people agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap


def mean_interval(values: np.ndarray) -> dict:
    """Mean of prompts x raters (nan: missing), its interval by drawing prompts, and what it stands on."""
    there = ~np.isnan(values)
    kept = there.any(axis=1)
    counts, sums = there.sum(axis=1)[kept], np.nansum(values, axis=1)[kept]
    prompts = len(counts)
    found = {"n": int(counts.sum()), "prompts": prompts, "mean": None, "low": None, "high": None}
    if prompts:
        found["mean"] = float(sums.sum() / counts.sum())
    if prompts > 1:  # one prompt says nothing about others
        drawn = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)
        found["low"], found["high"] = np.percentile((drawn @ sums) / (drawn @ counts), [2.5, 97.5]).tolist()
    return found


def krippendorff_alpha(values: np.ndarray, levels: Sequence[int] = range(1, 6)) -> float | None:
    """Ordinal alpha of units x raters (nan: missing); None where no two raters met or all ratings are one value.

    Krippendorff, Content Analysis, chapter on reliability: 1 - observed / expected disagreement of pairs of ratings.
    """
    counts = (values[:, :, None] == np.array(levels)).sum(axis=1)  # unit x level
    counts = counts[counts.sum(axis=1) > 1]
    # a unit's ordered pairs of ratings weigh 1 / (ratings - 1), so that a rating counts the same everywhere; pairs of
    # a rating with itself are in too, at no distance
    weights = 1 / (counts.sum(axis=1) - 1)
    pairs = (counts.T * weights) @ counts
    totals = counts.sum(axis=0)
    middles = np.cumsum(totals) - totals / 2  # mean rank of a level; ordinal distance is a difference of ranks
    distances = (middles[:, None] - middles) ** 2
    expected = (totals[:, None] * totals * distances).sum()
    if expected == 0:
        return None
    return float(1 - (totals.sum() - 1) * (pairs * distances).sum() / expected)
