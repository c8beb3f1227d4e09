"""The whole grid of k and alpha as heat maps: ours, and where it stands beside them the paper's and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.plots import grid_of, heat_map
from experiments.records import unpack
from paper.manifest import Manifest
from paper.specs import Spec
from paper.studies import picture

NEEDS_A_JUDGE = (
    "the paper's win rate needs a judge (`python main.py judge`); "
    "drawn is how often the good answer is the likelier one"
)


def draw(spec: Spec, manifest: Manifest, path: Path) -> str | None:
    """The picture, and how it is to be read; None without any record."""
    places = [(block, row, column) for block in spec.blocks for row in spec.rows for column in spec.columns]
    found = [(place, records[0]) for place in places if (records := manifest.records(spec.name, *place))]
    if not found:
        return None
    beside = [(place, record) for place, record in found if _printed(spec, place) is not None]
    alone = [(place, record) for place, record in found if _printed(spec, place) is None]
    wide = 3 if beside else len(spec.columns)
    lines = [alone[start : start + wide] for start in range(0, len(alone), wide)]
    high = len(beside) + len(lines)
    figure, axes = picture.subplots(wide, (5.6 * wide, 4.5 * high), rows=high, squeeze=False)
    for of_line, (place, record) in zip(axes, beside, strict=False):
        _three(of_line, spec, place, record, _printed(spec, place))
    for of_line, line in zip(axes[len(beside) :], lines, strict=True):
        for axis in of_line[len(line) :]:
            axis.axis("off")
        for axis, (place, record) in zip(of_line, line, strict=False):
            _ours(axis, spec, place, record)
    if len(spec.blocks) == 1:
        figure.suptitle(found[0][0][0], fontsize=14)
    picture.save(figure, path)
    note = "Every map has its own color scale" + (
        "; ours and the paper's of one measure share theirs." if beside else "."
    )
    if any(spec.columns[column].get("judge") for (_, _, column), _ in found):
        note += f" Of {', '.join(c for c, says in spec.columns.items() if says.get('judge'))}: {NEEDS_A_JUDGE}."
    return note


def _printed(spec: Spec, place: tuple[str, str, str]) -> np.ndarray | None:
    block, row, column = place
    grid = spec.printed.get(block, {}).get(row, {}).get(column)
    return None if grid is None else np.array(grid)


def _three(axes: Sequence, spec: Spec, place: tuple[str, str, str], record: dict, printed: np.ndarray) -> None:
    """Ours, the paper's, ours less the paper's."""
    says = spec.columns[place[2]]
    ks, alphas, values = grid_of(record["grid_scores"])
    title = f"{says.get('task', place[2])}: {spec.rows[place[1]]['label']}"
    if says.get("judge"):
        _ours(axes[0], spec, place, record)
        heat_map(
            axes[1], says["ks"], says["alphas"], printed, f"{title}, the paper\nwin rate, by a judge", 1, "ΔWR, points"
        )
        _said(axes[2], "No difference:\nthese are two measures.")
        return
    limits = {"vmin": min(100 * values.min(), printed.min()), "vmax": max(100 * values.max(), printed.max())}
    _ours(axes[0], spec, place, record, **limits)
    heat_map(
        axes[1], says["ks"], says["alphas"], printed, f"{title}, the paper", 1, f"{record['measure']}, %", **limits
    )
    if (ks, alphas) != ([*says["ks"]], [*says["alphas"]]):
        _said(axes[2], "No difference:\nour grid is another.")
        return
    difference = 100 * values - printed
    most = abs(difference).max() or 1.0
    look = {"cmap": "PuOr_r", "vmin": -most, "vmax": most}
    heat_map(axes[2], ks, alphas, difference, f"{title},\nours less the paper's", 1, "difference, points", **look)


def _ours(axis, spec: Spec, place: tuple[str, str, str], record: dict, **limits) -> None:
    block, row, column = place
    before = unpack(record["grid_vanilla"])
    of_block = f"{block}, " if len(spec.blocks) > 1 else ""
    title = (
        f"{of_block}{spec.columns[column].get('task', column)}: {spec.rows[row]['label']}\n"
        f"{record['measure']}, vanilla {100 * sum(before) / len(before):.1f}"
    )
    ks, alphas, values = grid_of(record["grid_scores"])
    heat_map(axis, ks, alphas, 100 * values, title, 1, f"{record['measure']}, %", **limits)


def _said(axis, text: str) -> None:
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
