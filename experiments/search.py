"""Choose a grid point on validation: the best one, if it beats vanilla.

Every search calls `ask(points, start, stop)` for the outcomes of validation items, in an order that `shuffled` fixes
beforehand, so that any two grid points are compared on the same items:
    grid     every point on every item
    sample   every point on the first 100 items (the paper's search, Table 7)
    racing   coarse points first, then those around the leaders, on growing samples; losing points drop out on the way
    test     as grid, for callers that ask on the test split, as the paper's main numbers were chosen
A race over COARSE or more points costs what a quarter of COARSE points would cost on all items, however fine the grid.
Among equal points the first wins: grids begin with the fewest AUs and the least strength.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binom

from austeer.methods.base import BUDGET, GridPoint
from experiments.lattice import Lattice

Ask = Callable[[Sequence[GridPoint], int, int], Sequence[Sequence[float]]]

SAMPLE = 100
COARSE = BUDGET["full"]  # points of the coarse pass
RACE_COST = 4  # a race costs at most what its coarse points cost on all items, divided by this
FEWEST = 20  # items that a point is evaluated on before it can drop out
LEADERS = 4  # points whose neighbours are tried next
EXPLORING = 0.75  # share of the budget that may be spent before the race
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
    """Explore the grid on a few items, then let the points that were tried race by successive halving.

    A grid of more than COARSE points is explored coarsely, then around the points that lead, at half the distance each
    time. In the race, the rest of the budget is shared evenly among the rounds to come. A round asks every racer the next
    items; then points drop out: those that are significantly worse than the best so far (vanilla included), and the worse
    half of the others. The last two race until one is worse, and the last one until it is better than vanilla, or until
    items or budget run out. The budget does not depend on how fine the grid is, and no point drops out on fewer than
    FEWEST items.
    """
    n, budget, stop = len(vanilla), race_budget(len(grid), len(vanilla)), min(FEWEST, len(vanilla))
    race = _Race(ask, grid)
    racers = _survivors(race, _explore(race, budget, stop), vanilla[:stop])
    while racers and stop < n:
        if len(racers) == 1 and worse(vanilla[:stop], race.outcomes[racers[0]]):
            break
        rounds = max(1, (len(racers) - 1).bit_length())  # halvings until one is left
        more = min(n - stop, (budget - race.cost) // (rounds * len(racers)))
        if more <= 0 and len(racers) <= 2:
            break
        stop += max(0, more)
        race.run(racers, stop)
        racers = _survivors(race, racers, vanilla[:stop])
    return _result(racers, race.outcomes, vanilla, grid)


def race_budget(points: int, items: int) -> int:
    """Return the largest number of item-runs that a race may use: at least FEWEST items for every coarse point."""
    coarse = min(points, COARSE)
    return max(coarse * items // RACE_COST, coarse * min(FEWEST, items))


class _Race:
    """Evaluate grid points on items, in order, and count the item-runs."""

    def __init__(self, ask: Ask, grid: Sequence[GridPoint]):
        self.ask, self.grid, self.cost = ask, grid, 0
        self.outcomes: list[list[float]] = [[] for _ in grid]

    def run(self, points: Sequence[int], stop: int) -> None:
        """Evaluate points on the items up to `stop`. All of them must have seen the same items so far."""
        start = len(self.outcomes[points[0]])
        if start < stop:
            for point, values in zip(points, self.ask([self.grid[i] for i in points], start, stop), strict=True):
                self.outcomes[point] += values
            self.cost += len(points) * (stop - start)

    def ahead(self, points: Sequence[int]) -> list[int]:
        """Order points, the best first. Among equals the stronger leads: on few items, weak steering changes nothing yet."""
        return sorted(points, key=lambda point: (sum(self.outcomes[point]), point), reverse=True)


def _explore(race: _Race, budget: int, stop: int) -> list[int]:
    """Evaluate coarse points on the items up to `stop`, then neighbours of the leaders. Return all evaluated points."""
    lattice, n_points = Lattice(race.grid), len(race.grid)
    # a fine grid leaves half of the budget for neighbours, even where items are few
    tried, steps = lattice.coarse(n_points if n_points <= COARSE else min(COARSE, max(1, budget // (2 * stop))))
    race.run(tried, stop)
    while max(steps) > 1:
        rounds = max(steps).bit_length() - 1  # halvings until the steps are 1
        room = int(EXPLORING * budget - race.cost) // (rounds * stop)
        steps = [max(1, step // 2) for step in steps]
        around = (near for leader in race.ahead(tried)[:LEADERS] for near in lattice.neighbours(leader, steps))
        newcomers = [point for point in dict.fromkeys(around) if point not in tried][: max(0, room)]
        if newcomers:
            race.run(newcomers, stop)
            tried += newcomers
    return tried


def _survivors(race: _Race, racers: Sequence[int], vanilla: Sequence[float]) -> list[int]:
    best = max((vanilla, *(race.outcomes[racer] for racer in racers)), key=sum)
    alive = [racer for racer in racers if not worse(race.outcomes[racer], best)]
    return sorted(race.ahead(alive)[: max(2, (len(racers) + 1) // 2)])


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
