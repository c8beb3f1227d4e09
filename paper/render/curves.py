"""Accuracy over an x of the columns: a panel a block, a line a row, and what doing nothing gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from matplotlib.lines import Line2D

from eval.statistics import wilson
from experiments.records import unpack
from paper.manifest import Manifest
from paper.render.tables import shown
from paper.specs import Spec
from paper.studies import picture

COLORS = (picture.BLUE, picture.VERMILLION, picture.GREEN, picture.PURPLE, picture.ORANGE, picture.SKY, picture.BLACK)
MARKERS = "osD^vPX*"  # not as many as colors: only the 57th line would look like the first
APART = 0.014  # of the width, between neighbouring lines: at the same accuracy none hides another


@dataclass(frozen=True)
class Point:
    x: float
    accuracy: float  # of draws the median
    low: float  # of draws the least, of one run its interval's end
    high: float
    draws: int
    unchosen: int  # draws whose search found nothing better than vanilla, and which are vanilla's therefore
    vanilla: float


def draw(spec: Spec, manifest: Manifest, path: Path) -> str | None:
    """The picture, and how it is to be read; None without any record."""
    figure, axes = picture.subplots(len(spec.blocks), (7 * len(spec.blocks), 5.6), squeeze=False, sharey=True)
    xs, log = [says["x"] for says in spec.columns.values()], bool(spec.show.get("log"))
    places = _beside(xs, log, len(spec.rows))
    names: dict[str, Line2D] = {}
    drawn: list[Point] = []
    for axis, block in zip(axes[0], spec.blocks, strict=True):
        of_block: list[Point] = []
        for index, row in enumerate(spec.rows):
            points = [
                point for column in spec.columns if (point := _point(spec, manifest, block, row, column)) is not None
            ]
            if points:
                says = spec.rows[row]
                at = [places[index][point.x] for point in points]
                name = _named(says["label"], points, says.get("draws", 1))
                names[name] = _line(axis, at, points, index, says.get("draws", 1) > 1)
                of_block += points
        vanilla = sorted({point.x: point.vanilla for point in of_block}.items())
        if vanilla:
            names.setdefault("vanilla", axis.plot(*zip(*vanilla, strict=True), "--", color=picture.GREY, zorder=2.5)[0])
        drawn += of_block
        axis.set(xlabel=spec.show["x"], title=block)
        if log:
            axis.set_xscale("log")
            axis.set_xticks(xs, [f"{x:.2g}" for x in xs])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    names |= _of_markers(drawn)
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=3, frameon=False)
    picture.save(figure, path) if drawn else picture.plt.close(figure)
    return _note(drawn) if drawn else None


def _point(spec: Spec, manifest: Manifest, block: str, row: str, column: str) -> Point | None:
    records = shown(spec, manifest, block, row, column)
    if not records:
        return None
    shares = [100 * record["right"] / record["n"] for record in records]
    if spec.rows[row].get("draws", 1) > 1:
        low, high = min(shares), max(shares)
    else:
        low, high = (100 * edge for edge in wilson(sum(unpack(records[0]["outcomes"])), records[0]["n"]))
    one = records[0]
    vanilla = 100 * (one["right"] - one.get("gained", 0) + one.get("lost", 0)) / one["n"]
    unchosen = sum(record["site"] is not None and record["settings"] is None for record in records)
    return Point(spec.columns[column]["x"], median(shares), low, high, len(records), unchosen, vanilla)


def _beside(xs: Sequence[float], log: bool, rows: int) -> list[dict[float, float]]:
    """Where a row's points stand, row by row: somewhat beside their x, and never as far as halfway to the next."""
    to, back = (math.log, math.exp) if log else (float, float)
    at = sorted(map(to, xs))
    width = at[-1] - at[0]
    least = min((b - a for a, b in pairwise(at)), default=0.0)
    apart = min(APART * width, 0.8 * least / rows)
    return [{x: back(to(x) + (row - (rows - 1) / 2) * apart) for x in xs} for row in range(rows)]


def _named(label: str, points: list[Point], draws: int) -> str:
    if draws == 1:
        return label
    there = sorted({point.draws for point in points})
    return f"{label}: median, and range of {' or '.join(map(str, there))} draws"


def _line(axis, at: list[float], points: list[Point], index: int, band: bool) -> Line2D:
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    lows, highs = [point.low for point in points], [point.high for point in points]
    if band:
        axis.fill_between(at, lows, highs, color=color, alpha=0.2, lw=0)
    else:
        axis.vlines(at, lows, highs, color=color, lw=1.4, alpha=0.7)
    axis.plot(at, [point.accuracy for point in points], color=color, lw=1.6)
    for x, point in zip(at, points, strict=True):
        axis.plot(x, point.accuracy, **_marker(color, marker, point.unchosen / point.draws))
    return Line2D([], [], lw=1.6, **_marker(color, marker, 0))


def _marker(color: str, marker: str, unchosen: float) -> dict:
    """Full if something was chosen, hollow if nothing was, half if only in some draws."""
    look = dict(color=color, marker=marker, ms=8, mew=1.5, markerfacecoloralt="white", zorder=3)
    if unchosen in (0, 1):
        return look | {"mfc": "white" if unchosen else color}
    return look | {"fillstyle": "left"}


def _of_markers(points: list[Point]) -> dict[str, Line2D]:
    found = {}
    if any(point.unchosen == point.draws for point in points):
        found["hollow: nothing beat vanilla, shown as vanilla"] = _marker(picture.GREY, "o", 1)
    if any(0 < point.unchosen < point.draws for point in points):
        found["half: so in some of the draws"] = _marker(picture.GREY, "o", 0.5)
    return {name: Line2D([], [], ls="", **look) for name, look in found.items()}


def _note(points: list[Point]) -> str:
    alone = [point for point in points if point.draws == 1]
    unchosen = sum(point.unchosen for point in points)
    note = "Whiskers: 95 % Wilson intervals. Lines are moved sideways a little, so that none hides another."
    if unchosen:
        note += f" In {unchosen} of {sum(point.draws for point in points)} searches nothing beat vanilla."
    return note if alone else note.partition(". ")[2]
