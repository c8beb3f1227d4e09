"""What the studies' pictures share. Colors are the Okabe-Ito set, safe for color-blind readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.plots import ink

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#555555"
SITES = {"attention": "attention", "ffn": "FFN"}
DASH = 6  # of lines that lie on one another, in widths of a line


def subplots(columns: int = 1, size: tuple[float, float] = (8.0, 4.6), rows: int = 1, **options):
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11.5, "figure.dpi": 110})
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save(figure, path: Path) -> None:
    """The same picture, the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def write_values(axis, values: np.ndarray, image, form: str) -> None:
    """Each cell's number on it; none where there is no number."""
    texts = [[format(value, form) if np.isfinite(value) else "" for value in row] for row in values]
    write_labels(axis, values, image, texts)


def write_labels(axis, values: np.ndarray, image, texts: list[list[str]]) -> None:
    """In black or white, whichever can be read on the cell's color."""
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, texts[i][j], ha="center", va="center", color=ink(image, value), parse_math=False)


@dataclass(frozen=True)
class Level:
    """A number shown as a line over the whole width."""

    y: float
    name: str
    color: str
    style: str = "-"
    width: float = 2.0


def draw_levels(axis, levels: Sequence[Level]) -> None:
    """Each named at its right end. Of equal ones all can be seen: dash by dash in turn."""
    of_height = Counter(round(level.y, 6) for level in levels)
    seen: Counter = Counter()
    for level in levels:
        height = round(level.y, 6)
        turn, alike = seen[height], of_height[height]
        style = level.style if alike == 1 else (-DASH * turn, (DASH, DASH * (alike - 1)))
        axis.axhline(level.y, color=level.color, ls=style, lw=level.width if alike == 1 else 2.0)
        seen[height] += 1
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)  # names are placed in these limits
    for level, place in zip(levels, spread([(level.y - low) / (high - low) for level in levels], 0.062), strict=True):
        axis.annotate(
            f"{level.name}: {level.y:.1f}",
            xy=(1, level.y),
            xycoords=axis.get_yaxis_transform(),
            xytext=(1.045, place),
            textcoords="axes fraction",
            va="center",
            fontsize=11.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": level.color,
                "lw": 1.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """As near to their places in 0 to 1 as they can be with a gap between neighbours (isotonic regression)."""
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[tuple[float, int]] = []  # sums and counts of places, less the gaps below them
    for rank, i in enumerate(order):
        total, count = places[i] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    level = [total / count for total, count in pools for _ in range(count)]
    top = 1 - gap * (len(places) - 1)
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = max(min(level[rank], top), min(0, top)) + rank * gap
    return found
