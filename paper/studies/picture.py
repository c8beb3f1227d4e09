"""Shared parts of the studies' pictures. Colors are the Okabe-Ito set, safe for color-blind readers."""

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
DASH = 6  # length of the dashes of coinciding lines, in line widths


def subplots(columns: int = 1, size: tuple[float, float] = (8.0, 4.6), rows: int = 1, **options):
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11.5, "figure.dpi": 110})
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save(figure, path: Path) -> None:
    """Save a figure; the same picture always gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def write_labels(axis, values: np.ndarray, image, texts: list[list[str]]) -> None:
    """Write texts on cells, in black or white, whichever is readable on the cell's color; nothing where a value is nan."""
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axis.text(j, i, texts[i][j], ha="center", va="center", color=ink(image, value), parse_math=False)


def with_printed(texts: list[list[str]], printed: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the texts of cells with the paper's below, where it has any."""
    if not printed:
        return texts
    return [
        [f"{text}\n{paper}" if paper else text for text, paper in zip(row, papers, strict=True)]
        for row, papers in zip(texts, printed, strict=True)
    ]


@dataclass(frozen=True)
class Level:
    """Describe a number that is drawn as a line over the whole width."""

    y: float
    name: str
    color: str
    style: str = "-"
    width: float = 2.0


def draw_levels(axis, levels: Sequence[Level]) -> None:
    """Draw levels as lines, named at their right ends. Equal ones alternate dash by dash, so that all are visible."""
    levels_at = Counter(round(level.y, 6) for level in levels)
    drawn_at: Counter = Counter()
    for level in levels:
        height = round(level.y, 6)
        turn, alike = drawn_at[height], levels_at[height]
        style = level.style if alike == 1 else (-DASH * turn, (DASH, DASH * (alike - 1)))
        axis.axhline(level.y, color=level.color, ls=style, lw=level.width if alike == 1 else 2.0)
        drawn_at[height] += 1
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
    """Return places in 0 to 1 that keep a gap, as near to the given ones as possible (isotonic regression)."""
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
    shifted = [0.0] * len(places)
    for rank, i in enumerate(order):
        shifted[i] = max(min(level[rank], top), min(0, top)) + rank * gap
    return shifted
