"""Order the points of a grid along its axes, so that a search can start with a few of them and refine around the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from austeer.methods.base import GridPoint

AXIS_LEAST = 3  # values that each axis keeps in the coarse pass, if that is enough to meet the limit


class Lattice:
    """Hold the place of every grid point: along each axis, the index of its value among the sorted values."""

    def __init__(self, grid: Sequence[GridPoint]):
        axes = {key: sorted({point[key] for point in grid}) for key in grid[0]}
        self.lengths = [len(values) for values in axes.values()]
        places = [tuple(values.index(point[key]) for key, values in axes.items()) for point in grid]
        self.places, self.indices = places, {place: index for index, place in enumerate(places)}

    def coarse(self, limit: int) -> tuple[list[int], list[int]]:
        """Return at most `limit` points, evenly spaced over the grid, and the steps between them on each axis.

        Earlier axes are thinned out first, so that the last one, the strength, stays the finest.
        """
        steps = [1] * len(self.lengths)
        for least in (AXIS_LEAST, 1):
            for axis, length in enumerate(self.lengths):
                while len(self._every(steps)) > limit and -(-length // steps[axis]) > least:
                    steps[axis] *= 2
        return self._every(steps), steps

    def _every(self, steps: Sequence[int]) -> list[int]:
        return [
            index
            for index, place in enumerate(self.places)
            if all(position % step == 0 for position, step in zip(place, steps, strict=True))
        ]

    def neighbours(self, index: int, steps: Sequence[int]) -> Iterator[int]:
        """Yield the points one step away from a point, along one axis at a time."""
        place = self.places[index]
        for axis, sign in product(range(len(steps)), (-1, 1)):
            neighbour = (*place[:axis], place[axis] + sign * steps[axis], *place[axis + 1 :])
            if neighbour in self.indices:
                yield self.indices[neighbour]
