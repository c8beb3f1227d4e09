"""Bring a change of a model to a stated KL on neutral text by one scalar, so that methods are compared at the same cost.

KL grows about with the square of the scalar. It is found by secants of log KL over log scalar, within what is known to be
too little and too much, in at most PASSES passes over the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from austeer.change import Change
from austeer.errors import AUSteerError, Overflow
from austeer.kl import KLMeter
from austeer.methods.base import GridPoint
from austeer.secant import next_try

PASSES = 6
CLOSE = 0.03  # a KL this near to the stated one, as a share of it, is not improved any more
TOLERATED = 0.1  # and one that is farther off than this is not the stated one
SQUARE = 2.0  # d log KL / d log scalar of a small change
TINY = 1e-12
# keys of grid points: how many AUs, how strongly, and a multiplier that makes larger or smaller
COUNTS, STRENGTHS, MULTIPLIER = ("k", "heads", "neurons"), ("alpha", "lambda", "factor", "strength", "kl"), "m"
MOST_CANDIDATES = 6  # each is brought to the KL and asked on validation


class Unreached(AUSteerError):
    """Say why a change cannot be brought to a KL."""


@dataclass(frozen=True)
class Scaled:
    change: Change
    factor: float
    kl: float


def scaled_to(change: Change, kl: float, meter: KLMeter | Callable[[Change], float], start: float = 1.0) -> Scaled:
    """Return the change times the factor at which it costs `kl`. start: the factor to try first."""
    tried: list[tuple[float, float]] = []  # (factor, KL)
    factor = start
    for _ in range(PASSES):
        cost = _cost(change, factor, meter)
        if cost == 0:
            raise Unreached("it changes nothing")
        tried.append((factor, cost))
        if abs(cost / kl - 1) < CLOSE:
            break
        factor = next_try(tried, kl, SQUARE)
    factor, cost = min(tried, key=lambda one: abs(math.log(one[1] / kl)))
    if abs(cost / kl - 1) > TOLERATED:
        nearest = f"the nearest of {PASSES} tries costs {cost:.3g}"
        raise Unreached(nearest if math.isfinite(cost) else f"it overflowed in {PASSES} tries")
    return Scaled(change.times(factor), factor, cost)


def _cost(change: Change, factor: float, meter: Callable[[Change], float]) -> float:
    """Return the KL under a change times a factor; inf where it is too strong for the model's numbers."""
    try:
        cost = meter(change.times(factor))
    except Overflow:
        return math.inf
    # rounding may leave a tiny cost below 0, and only a change of nothing costs exactly that
    return math.inf if not math.isfinite(cost) else max(cost, TINY) if cost else 0.0


def candidates(points: Sequence[GridPoint]) -> list[GridPoint]:
    """Return the grid points that are brought to a KL: with the most AUs, at the gentlest strength, and every other choice.

    Where the other choices are more than MOST_CANDIDATES together, each axis keeps some of its values, evenly spaced.
    """
    axes = {key: list(dict.fromkeys(point[key] for point in points)) for key in points[0]}
    for key, values in axes.items():
        if key in COUNTS:
            axes[key] = [max(values)]
        elif key in STRENGTHS:
            axes[key] = values[:1]
        elif key == MULTIPLIER:
            axes[key] = [*[v for v in values if v < 1][:1], *[v for v in values if v > 1][:1]]
    if math.prod(map(len, axes.values())) > MOST_CANDIDATES:
        kept = int(MOST_CANDIDATES ** (1 / sum(len(values) > 1 for values in axes.values())))
        axes = {key: _spread(values, kept) for key, values in axes.items()}
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _spread(values: Sequence[float], kept: int) -> list[float]:
    """Return so many of the values, each in the middle of its part of the list; all if they are fewer."""
    return [values[int((part + 0.5) * len(values) / kept)] for part in range(kept)] if len(values) > kept else [*values]
