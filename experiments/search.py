"""Choose settings on validation: the best of a grid, if it beats doing nothing.

All searches ask in the same way, `ask(some settings, start, stop)`, for the outcomes of validation items in an order that
`shuffled` fixes beforehand, so that any two settings meet on the same items:
    grid     every setting on every item
    sample   every setting on the first 100 items (the paper's search, Table 7)
    racing   on growing samples; what loses leaves. A quarter of the grid's cost at most
    test     the grid's way, for a caller who asks on the test split, as the paper's main numbers were chosen
Of equal settings the first wins: grids begin with what touches least, or least strongly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binom

from austeer.methods.base import GridPoint

Ask = Callable[[Sequence[GridPoint], int, int], Sequence[Sequence[float]]]

SAMPLE = 100
RACE_COST = 4  # a race may cost one part in so many of the full grid
CONFIDENCE = 0.95  # of the tests by which a setting leaves a race, or ends it


@dataclass(frozen=True)
class Found:
    chosen: GridPoint | None  # None where nothing beats doing nothing
    scores: dict[str, float]  # by `key_of`: mean outcome of the items each was asked on
    outcomes: dict[str, list[float]]  # the first so many of the shuffled items
    asked: int  # item-runs spent
    n: int  # items there were


def key_of(point: GridPoint) -> str:
    return ",".join(f"{value:g}" for value in point.values())


def shuffled(n: int) -> list[int]:
    """The order in which n validation items are asked, the same for all settings and methods."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    return order


def full_grid(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> Found:
    outcomes = list(map(list, ask(grid, 0, len(vanilla))))
    return _found(range(len(grid)), outcomes, vanilla, grid)


def sample(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> Found:
    return full_grid(ask, vanilla[:SAMPLE], grid)


def racing(ask: Ask, vanilla: Sequence[float], grid: Sequence[GridPoint]) -> Found:
    """Successive halving with early leave.

    What is left of the budget is shared out evenly over the rounds to come. A round asks every setting in the race
    on the next items; then those leave that are worse than the best so far, be it doing nothing, and of the rest the
    worse half. The last two stay until one is worse, and one alone until it is better than doing nothing, or until
    items or budget end.
    """
    n, budget = len(vanilla), len(grid) * len(vanilla) // RACE_COST
    outcomes: list[list[float]] = [[] for _ in grid]
    racers, stop, asked = list(range(len(grid))), 0, 0
    while racers and stop < n:
        if len(racers) == 1 and worse(vanilla[:stop], outcomes[racers[0]]):
            break
        rounds = max(1, (len(racers) - 1).bit_length())  # halvings until one is left
        more = min(n - stop, (budget - asked) // (rounds * len(racers)))
        if not more and len(racers) <= 2:
            break
        asked_now = ask([grid[racer] for racer in racers], stop, stop + more)
        for racer, found in zip(racers, asked_now, strict=True):
            outcomes[racer] += found
        stop, asked = stop + more, asked + more * len(racers)
        racers = _staying([(racer, outcomes[racer]) for racer in racers], vanilla[:stop])
    return _found(racers, outcomes, vanilla, grid)


def _staying(race: Sequence[tuple[int, Sequence[float]]], vanilla: Sequence[float]) -> list[int]:
    half = max(2, (len(race) + 1) // 2)
    best = max((vanilla, *(values for _, values in race)), key=sum)
    alive = [(racer, values) for racer, values in race if not worse(values, best)]
    # of equal ones the stronger stays: on few items, what touches little is equal to doing nothing
    ahead = sorted(alive, key=lambda one: (sum(one[1]), one[0]), reverse=True)[:half]
    return sorted(racer for racer, _ in ahead)


def worse(values: Sequence[float], best: Sequence[float]) -> bool:
    """Exact one-sided sign test (McNemar's, of right and wrong) on the items where the two differ."""
    lost = sum(value < other for value, other in zip(values, best, strict=True))
    won = sum(value > other for value, other in zip(values, best, strict=True))
    return bool(binom.cdf(won, won + lost, 0.5) <= 1 - CONFIDENCE)


def _found(
    racers: Sequence[int], outcomes: Sequence[list[float]], vanilla: Sequence[float], grid: Sequence[GridPoint]
) -> Found:
    """Of these settings, all asked on the same items, the best; None if doing nothing is as good on them."""
    best = max(racers, key=lambda i: (sum(outcomes[i]), -i), default=None)
    beats = best is not None and sum(outcomes[best]) > sum(vanilla[: len(outcomes[best])])
    by_key = {key_of(point): values for point, values in zip(grid, outcomes, strict=True) if values}
    scores = {key: sum(values) / len(values) for key, values in by_key.items()}
    return Found(grid[best] if beats else None, scores, by_key, sum(map(len, outcomes)), len(vanilla))


SEARCHES = {"grid": full_grid, "sample": sample, "racing": racing, "test": full_grid}
