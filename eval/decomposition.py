"""Take the gain of a method on questions with two options apart: into skill, bias and format.

Of every item three things are known, steered and not:
    E  the answer, word for word, is the right option (exact match)
    C  the model finds the right option likelier than the other
    K  the same, once a constant is taken off the log-odds of the first option: what the model would answer if it
       preferred neither option as such. The constant is fitted on items that are not counted here
and item by item
    gain in E  =  gain in K                      skill: the model knows more
               +  fall of (K - C)                bias: a constant preference costs fewer answers
               +  fall of (C - E)                format: the answer is an option, and the likelier one, more often

Of answers that are compared by likelihood, the gain in mean log sigmoid(M), M the log-odds of the right answer, has two parts:
    skill        the gain at the best temperatures, those that maximise the mean of log sigmoid(M / tau), before and after
    calibration  the rest: log-odds whose size fits better how often they are right
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from austeer.pairs import Pair
from austeer.temperature import fit
from eval.statistics import bootstrap, mcnemar, sign_flip

PARTS = ("skill", "bias", "format")
LIKELIER = "likelier option"  # C, the name of its column
UNBIASED = "likelier option, offset removed"  # K


class Preferences(NamedTuple):
    """Hold of every item the log-odds of the first option over the second, and whether the first is right."""

    log_odds: list[float]
    first: list[bool]

    @property
    def right(self) -> list[bool]:
        return is_right(*self, 0.0)


@dataclass(frozen=True)
class Readings:
    """Hold E, C and K of every item, each True or False."""

    exact: list[bool]
    likelier: list[bool]
    unbiased: list[bool]


def is_right(log_odds: Sequence[float], first: Sequence[bool], offset: float) -> list[bool]:
    """Say of every item whether the likelier option is the right one, a constant taken off. A tie is the first option."""
    return [(value >= offset) == right for value, right in zip(log_odds, first, strict=True)]


def fitted_offset(log_odds: Sequence[float], first: Sequence[bool]) -> float:
    """Return the constant that makes the most answers right; among equals, the one nearest to 0.

    The candidates are 0 and the middles between neighbours, so that no item decides by a tie.
    """
    values, first = np.asarray(log_odds, float), np.asarray(first, bool)
    edges = np.unique(values)
    candidates = np.concatenate([[0.0, edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
    # an item of the first kind is right from the constant up, one of the second below it
    above = first.sum() - np.searchsorted(np.sort(values[first]), candidates)
    below = np.searchsorted(np.sort(values[~first]), candidates)
    return float(candidates[np.lexsort((np.abs(candidates), -(above + below)))[0]])


def without_offset(tested: Preferences, others: Preferences | None) -> tuple[list[bool], float | None]:
    """Return K, and the constant that was fitted on other items; None where there are none, and folds take their place."""
    if others is None:
        return cross_fitted(*tested), None
    offset = fitted_offset(*others)
    return is_right(*tested, offset), offset


def cross_fitted(log_odds: Sequence[float], first: Sequence[bool], folds: int = 5) -> list[bool]:
    """Return K where there are no other items to fit on: of every fold, with the constant of the others."""
    right = [False] * len(first)
    for fold in range(min(folds, len(first))):
        rest = [i for i in range(len(first)) if i % folds != fold]
        offset = fitted_offset([log_odds[i] for i in rest], [first[i] for i in rest]) if rest else 0.0
        for i in range(fold, len(first), folds):
            right[i] = is_right(log_odds[i : i + 1], first[i : i + 1], offset)[0]
    return right


def auc(log_odds: Sequence[float], first: Sequence[bool]) -> float | None:
    """Return how often an item whose first option is right has the higher log-odds than one whose second is.

    None where only one of the options is ever right.
    """
    positive = np.asarray(first, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    return float((rankdata(log_odds)[positive].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True)
class Part:
    name: str
    gain: float  # in points, of likelihoods in nats
    low: float  # of its 95 % interval, over items
    high: float
    p: float | None  # McNemar's; of skill alone: the other parts are differences of two outcomes


def changes(before: Readings, after: Readings) -> dict[str, np.ndarray]:
    """Return the parts of the gain of every item. They add up to its gain in exact match."""
    (e, c, k), (e_after, c_after, k_after) = (
        (np.asarray(values, int) for values in (one.exact, one.likelier, one.unbiased)) for one in (before, after)
    )
    return {"skill": k_after - k, "bias": (k - c) - (k_after - c_after), "format": (c - e) - (c_after - e_after)}


def taken_apart(before: Readings, after: Readings) -> list[Part]:
    """Return the parts of the gain, in points, with intervals over items. They add up to the gain in exact match."""
    p = mcnemar(before.unbiased, after.unbiased)[2]
    return [
        Part(
            name,
            100 * float(values.mean()),
            *(100 * edge for edge in bootstrap(values)),
            p if name == "skill" else None,
        )
        for name, values in changes(before, after).items()
    ]


def likelihood_taken_apart(before: Sequence[float], runs: Sequence[Sequence[float]]) -> list[Part]:
    """Return the parts of the gain of a likelihood from log-odds of the right answers, in nats. They add up to it.

    runs: log-odds of the same items, one list for each draw; the gains of an item are averaged over draws.
    """
    of_runs = [
        [_likelihood(of, tau) - _likelihood(before, base) for tau, base in ((1.0, 1.0), (_temperature(of), _temperature(before)))]
        for of in runs
    ]  # fmt: skip
    raw, skill = np.mean(of_runs, axis=0)
    return [
        Part(name, float(gains.mean()), *bootstrap(gains), sign_flip(gains) if name == "skill" else None)
        for name, gains in (("skill", skill), ("calibration", raw - skill))
    ]


def _likelihood(log_odds: Sequence[float], tau: float) -> np.ndarray:
    return -np.logaddexp(0.0, -np.asarray(log_odds, float) / tau)


def _temperature(log_odds: Sequence[float]) -> float:
    alike = [Pair("", "right", "wrong")] * len(log_odds)  # no answer is shared, so no offsets are fitted
    return fit(torch.tensor(log_odds, dtype=torch.float64), alike).tau
