"""Choose settings on validation: every setting of a grid is tried, and the best is taken if it beats doing nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Settings = dict[str, float]


def search(
    score: Callable[[Settings], float], vanilla: float, grid: Sequence[Settings]
) -> tuple[Settings | None, dict[str, float]]:
    """The best settings, with every setting's score; None where none beats doing nothing.

    Of equal ones the first wins: grids begin with what touches least, or least strongly.
    """
    scores = [score(settings) for settings in grid]
    best = max(range(len(grid)), key=lambda i: (scores[i], -i))
    chosen = grid[best] if scores[best] > vanilla else None
    return chosen, {key_of(settings): value for settings, value in zip(grid, scores, strict=True)}


def key_of(settings: Settings) -> str:
    return ",".join(f"{value:g}" for value in settings.values())
