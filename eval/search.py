"""Choose k and alpha on validation: a grid, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

# k and alpha. The paper steers at most 100 AUs and sweeps alpha to 100; the embedded models have 512 AUs a site
GRIDS = {
    "embedded": ((4, 16, 32), (0.5, 1.0, 2.0, 4.0, 8.0)),
    "real": ((8, 32, 100), (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)),
}


def search(
    score: Callable[[int, float], float], vanilla: float, ks: Iterable[int], alphas: Iterable[float]
) -> tuple[tuple[int, float] | None, dict[str, float]]:
    """The best (k, alpha) with every cell's score; None where no cell beats doing nothing.

    Of equal cells the gentler wins: fewer AUs, then the smaller alpha.
    """
    grid = {(k, alpha): score(k, alpha) for k, alpha in product(ks, alphas)}
    best = max(grid, key=lambda cell: (grid[cell], -cell[0], -cell[1]))
    chosen = best if grid[best] > vanilla else None
    return chosen, {f"{k},{alpha:g}": value for (k, alpha), value in grid.items()}
