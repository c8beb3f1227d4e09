"""Choose k and alpha on validation: a grid, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

KS = (4, 16, 32)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)


def search(
    score: Callable[[int, float], float], vanilla: float, ks: Iterable[int] = KS, alphas: Iterable[float] = ALPHAS
) -> tuple[tuple[int, float] | None, dict[str, float]]:
    """The best (k, alpha) with every cell's score; None where no cell beats doing nothing.

    Of equal cells the gentler wins: fewer AUs, then the smaller alpha.
    """
    grid = {(k, alpha): score(k, alpha) for k, alpha in product(ks, alphas)}
    best = max(grid, key=lambda cell: (grid[cell], -cell[0], -cell[1]))
    chosen = best if grid[best] > vanilla else None
    return chosen, {f"{k},{alpha:g}": value for (k, alpha), value in grid.items()}
