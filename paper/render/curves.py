"""Draw accuracy over the x of the columns: a panel per block, a line per row, and vanilla."""

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
from paper.render.tables import selected_records
from paper.specs import Spec
from paper.studies import picture

COLORS = (picture.BLUE, picture.VERMILLION, picture.GREEN, picture.PURPLE, picture.ORANGE, picture.SKY, picture.BLACK)
MARKERS = "osD^vPX*"  # not as many as colors, so that only the 57th line looks like the first
APART = 0.014  # shift between neighbouring lines, as a share of the width: none hides another


@dataclass(frozen=True)
class Point:
    x: float
    column: str
    ids: tuple[str, ...]  # of its records
    accuracy: float  # the median of several draws
    low: float  # the lowest draw, or the lower end of a single run's interval
    high: float
    draws: int
    unchosen: int  # draws whose search found nothing better than vanilla, so that they show vanilla
    vanilla: float


def draw(spec: Spec, manifest: Manifest, path: Path) -> str | None:
    """Draw the picture and return how to read it; None without any record."""
    found = {
        (block, row): [
            point for column in spec.columns if (point := _point(spec, manifest, block, row, column)) is not None
        ]
        for block in spec.blocks
        for row in spec.rows
    }
    lines = {place: list({(point.ids, point.x): point for point in points}.values()) for place, points in found.items()}
    all_points = [point for points in lines.values() for point in points]
    if not all_points:
        return None
    figure, axes = picture.subplots(len(spec.blocks), (7 * len(spec.blocks), 5.6), squeeze=False, sharey=True)
    log = bool(spec.show.get("log"))
    legend: dict[str, Line2D] = {}
    for axis, block in zip(axes[0], spec.blocks, strict=True):
        xs = sorted({point.x for row in spec.rows for point in lines[block, row]})
        places = _shifted_xs(xs, log, len(spec.rows))
        for index, row in enumerate(spec.rows):
            if points := lines[block, row]:
                row_fields = spec.rows[row]
                xs_of_row = [places[index][point.x] for point in points]
                numbers = sorted({point.draws for point in points})
                legend[_legend_label(row_fields["label"], numbers)] = _line(
                    axis, xs_of_row, points, index, numbers[-1] > 1
                )
        vanilla = sorted({point.x: point.vanilla for row in spec.rows for point in lines[block, row]}.items())
        if vanilla:
            legend.setdefault(
                "vanilla", axis.plot(*zip(*vanilla, strict=True), "--", color=picture.GREY, zorder=2.5)[0]
            )
        axis.set(xlabel=spec.show["x"], title=block)
        if log:
            axis.set_xscale("log")
            axis.set_xticks(xs, [f"{x:.2g}" for x in xs])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    legend |= _marker_legend(all_points)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
    picture.save(figure, path)
    return " ".join([_note(all_points), *_drawn_once(found)])


def _drawn_once(found: dict[tuple[str, str], list[Point]]) -> list[str]:
    """Say which columns of a panel are one and the same run, because they ask for more pairs than there are."""
    sentences = []
    for (block, _), points in found.items():
        for ids, x in dict.fromkeys((point.ids, point.x) for point in points):
            names = [point.column for point in points if (point.ids, point.x) == (ids, x)]
            if len(names) > 1:
                sentences.append(f"{block}: {', '.join(names)} are one run, drawn once, at {x:g}.")
    return list(dict.fromkeys(sentences))


def _point(spec: Spec, manifest: Manifest, block: str, row: str, column: str) -> Point | None:
    records = [record for record in selected_records(spec, manifest, block, row, column) if "right" in record]
    if not records:  # none, or none that reached its KL
        return None
    shares = [100 * record["right"] / record["n"] for record in records]
    if len(records) > 1:
        low, high = min(shares), max(shares)
    else:
        low, high = (100 * edge for edge in wilson(sum(unpack(records[0]["outcomes"])), records[0]["n"]))
    first = records[0]
    vanilla = 100 * (first["right"] - first.get("gained", 0) + first.get("lost", 0)) / first["n"]
    unchosen = sum(record["site"] is not None and record["settings"] is None for record in records)
    # how many pairs there were, for example, where a column can only ask for a number
    x = first.get(spec.show.get("x_of"), spec.columns[column].get("x"))
    if x is None:
        return None  # a run without pairs, such as prompt only, has no place on an axis of pairs
    ids = tuple(record["id"] for record in records)
    return Point(x, column, ids, median(shares), low, high, len(records), unchosen, vanilla)


def _shifted_xs(xs: Sequence[float], log: bool, rows: int) -> list[dict[float, float]]:
    """Return, row by row, the x at which points are drawn: a little beside their own, never halfway to the next."""
    transform, inverse = (math.log, math.exp) if log else (float, float)
    transformed = sorted(map(transform, xs))
    width = transformed[-1] - transformed[0] if xs else 0.0
    narrowest = min((b - a for a, b in pairwise(transformed)), default=0.0)
    apart = min(APART * width, 0.8 * narrowest / rows)
    return [{x: inverse(transform(x) + (row - (rows - 1) / 2) * apart) for x in xs} for row in range(rows)]


def _legend_label(label: str, draws: list[int]) -> str:
    """Return a line's name in the legend. draws: the numbers of draws that its points have."""
    return label if draws == [1] else f"{label}: median, and range of {' or '.join(map(str, draws))} draws"


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
    """Return the style of a marker: full if a grid point was chosen, hollow if none, half if only in some draws."""
    style = dict(color=color, marker=marker, ms=8, mew=1.5, markerfacecoloralt="white", zorder=3)
    if unchosen in (0, 1):
        return style | {"mfc": "white" if unchosen else color}
    return style | {"fillstyle": "left"}


def _marker_legend(points: list[Point]) -> dict[str, Line2D]:
    markers = {}
    if any(point.unchosen == point.draws for point in points):
        markers["hollow: nothing beat vanilla, shown as vanilla"] = _marker(picture.GREY, "o", 1)
    if any(0 < point.unchosen < point.draws for point in points):
        markers["half: nothing beat vanilla in some of the draws"] = _marker(picture.GREY, "o", 0.5)
    return {name: Line2D([], [], ls="", **style) for name, style in markers.items()}


def _note(points: list[Point]) -> str:
    single_runs = [point for point in points if point.draws == 1]
    unchosen = sum(point.unchosen for point in points)
    note = "Whiskers: 95 % Wilson intervals. Lines are shifted sideways a little, so that none hides another."
    if unchosen:
        note += f" In {unchosen} of {sum(point.draws for point in points)} searches nothing beat vanilla."
    return note if single_runs else note.partition(". ")[2]
