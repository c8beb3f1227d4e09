"""Choose a grid point on validation: the best one, if it beats vanilla.

Every search calls `ask(points, start, stop)` for the outcomes of validation items, in an order that `shuffled` fixes
beforehand, so that any two grid points are compared on the same items:
    grid     every point on every item
    sample   every point on the first 100 items (the paper's search, Table 7)
    racing   growing samples, from which losing points drop out: at most a quarter of the grid's cost
    test     as grid, for callers that ask on the test split, as the paper's main numbers were chosen
Among equal points the first wins: grids begin with the fewest AUs and the least strength.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binom

from austeer.methods.base import GridPoint

Ask = Callable[[Sequence[GridPoint], int, int], Sequence[Sequence[float]]]

SAMPLE = 100
RACE_COST = 4  # a race costs at most the full grid's cost divided by this
CONFIDENCE = 0.95  # level of the tests by which a grid point leaves a race, or ends it


@dataclass(frozen=True)
class SearchResult:
    chosen: GridPoint | None  # None where no point beats vanilla
    scores: dict[str, float]  # `key_of` the point -> mean outcome over the items that it was evaluated on
    outcomes: dict[str, list[float]]  # `key_of` the point -> its outcomes on the first of the shuffled items
    n_evaluated: int  # item-runs: items times grid points
    n: int  # items available


def key_of(point: GridPoint) -> str:
    return ",".join(f"{value:g}" for value in point.values())


def shuffled(n: int) -> list[int]:
    """Return the order in which n validation items are asked, the same for all grid points and methods."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    return order


def full_grid(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> SearchResult:
    outcomes = list(map(list, ask(grid, 0, len(vanilla))))
    return _result(range(len(grid)), outcomes, vanilla, grid)


def sample(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> SearchResult:
    return full_grid(ask, vanilla[:SAMPLE], grid)


def racing(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> SearchResult:
    """Search by successive halving, where clear losers leave early.

    The rest of the budget is shared evenly among the rounds to come. A round evaluates every point in the race on the
    next items; then points drop out: those that are significantly worse than the best so far (vanilla included), and the
    worse half of the others. The last two race until one is worse, and the last one until it is better than vanilla,
    or until items or budget run out.
    """
    n, budget = len(vanilla), len(grid) * len(vanilla) // RACE_COST
    outcomes: list[list[float]] = [[] for _ in grid]
    racers, stop, cost = list(range(len(grid))), 0, 0
    while racers and stop < n:
        if len(racers) == 1 and worse(vanilla[:stop], outcomes[racers[0]]):
            break
        rounds = max(1, (len(racers) - 1).bit_length())  # halvings until one is left
        more = min(n - stop, (budget - cost) // (rounds * len(racers)))
        if not more and len(racers) <= 2:
            break
        new_outcomes = ask([grid[racer] for racer in racers], stop, stop + more)
        for racer, values in zip(racers, new_outcomes, strict=True):
            outcomes[racer] += values
        stop, cost = stop + more, cost + more * len(racers)
        racers = _survivors([(racer, outcomes[racer]) for racer in racers], vanilla[:stop])
    return _result(racers, outcomes, vanilla, grid)


def _survivors(race: Sequence[tuple[int, Sequence[float]]], vanilla: Sequence[float]) -> list[int]:
    half = max(2, (len(race) + 1) // 2)
    best = max((vanilla, *(values for _, values in race)), key=sum)
    alive = [(racer, values) for racer, values in race if not worse(values, best)]
    # among equal points the stronger stays: on few items, weak steering changes nothing yet
    ahead = sorted(alive, key=lambda one: (sum(one[1]), one[0]), reverse=True)[:half]
    return sorted(racer for racer, _ in ahead)


def worse(values: Sequence[float], best: Sequence[float]) -> bool:
    """Test whether values are worse: an exact one-sided sign test (McNemar's) on the items where the two differ."""
    lost = sum(value < other for value, other in zip(values, best, strict=True))
    won = sum(value > other for value, other in zip(values, best, strict=True))
    return bool(binom.cdf(won, won + lost, 0.5) <= 1 - CONFIDENCE)


def _result(
    racers: Sequence[int], outcomes: Sequence[list[float]], vanilla: Sequence[float], grid: Sequence[GridPoint]
) -> SearchResult:
    """Choose the best of the racers, all evaluated on the same items; None if vanilla is as good on these."""
    best = max(racers, key=lambda i: (sum(outcomes[i]), -i), default=None)
    beats = best is not None and sum(outcomes[best]) > sum(vanilla[: len(outcomes[best])])
    by_key = {key_of(point): values for point, values in zip(grid, outcomes, strict=True) if values}
    scores = {key: sum(values) / len(values) for key, values in by_key.items()}
    return SearchResult(grid[best] if beats else None, scores, by_key, sum(map(len, outcomes)), len(vanilla))


SEARCHES = {"grid": full_grid, "sample": sample, "racing": racing, "test": full_grid}
