"""Draw grids of k and alpha as heat maps: ours and, where the paper prints one, its grid and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np

from experiments.plots import grid_of, heat_map
from experiments.records import unpack
from paper.comparable import differences
from paper.manifest import Manifest
from paper.specs import Spec
from paper.studies import picture

NEEDS_A_JUDGE = (
    "the paper's win rate needs a judge (`python main.py judge`); "
    "the map shows how often the good answer is the likelier one"
)


def draw(spec: Spec, manifest: Manifest, path: Path) -> str | None:
    """Draw the picture and return how to read it; None without any record."""
    places = [(block, row, column) for block in spec.blocks for row in spec.rows for column in spec.columns]
    cells = [(place, records[0]) for place in places if (records := manifest.records(spec.name, *place))]
    if not cells:
        return None
    printed_cells = [(place, record) for place, record in cells if _printed(spec, place) is not None]
    other_cells = [(place, record) for place, record in cells if _printed(spec, place) is None]
    n_columns = 3 if printed_cells else len(spec.columns)
    lines = [other_cells[start : start + n_columns] for start in range(0, len(other_cells), n_columns)]
    n_rows = len(printed_cells) + len(lines)
    figure, axes = picture.subplots(n_columns, (5.6 * n_columns, 4.5 * n_rows), rows=n_rows, squeeze=False)
    for line_axes, (place, record) in zip(axes, printed_cells, strict=False):
        _draw_comparison(line_axes, spec, place, record, _printed(spec, place))
    for line_axes, line in zip(axes[len(printed_cells) :], lines, strict=True):
        for axis in line_axes[len(line) :]:
            axis.axis("off")
        for axis, (place, record) in zip(line_axes, line, strict=False):
            _draw_ours(axis, spec, place, record)
    if len(spec.blocks) == 1:
        figure.suptitle(cells[0][0][0], fontsize=14)
    picture.save(figure, path)
    note = "Every map has its own color scale" + (
        "; ours and the paper's of one measure share theirs." if printed_cells else "."
    )
    if any(spec.columns[column].get("judge") for (_, _, column), _ in cells):
        note += f" For {', '.join(c for c, fields in spec.columns.items() if fields.get('judge'))}, {NEEDS_A_JUDGE}."
    return note


def _printed(spec: Spec, place: tuple[str, str, str]) -> np.ndarray | None:
    block, row, column = place
    grid = spec.printed.get(block, {}).get(row, {}).get(column)
    return None if grid is None else np.array(grid)


def _draw_comparison(
    axes: Sequence, spec: Spec, place: tuple[str, str, str], record: dict, printed: np.ndarray
) -> None:
    """Draw ours, the paper's, and ours less the paper's."""
    fields = spec.columns[place[2]]
    ks, alphas, values = grid_of(record["grid_scores"])
    title = f"{fields.get('task', place[2])}: {spec.rows[place[1]]['label']}"
    if fields.get("judge"):
        _draw_ours(axes[0], spec, place, record)
        heat_map(
            axes[1],
            fields["ks"],
            fields["alphas"],
            printed,
            f"{title}, the paper\nwin rate, by a judge",
            1,
            "ΔWR, points",
        )
        _write(axes[2], "No difference:\nthese are two measures.")
        return
    limits = {"vmin": min(100 * values.min(), printed.min()), "vmax": max(100 * values.max(), printed.max())}
    _draw_ours(axes[0], spec, place, record, **limits)
    heat_map(
        axes[1], fields["ks"], fields["alphas"], printed, f"{title}, the paper", 1, f"{record['measure']}, %", **limits
    )
    if reasons := differences(record):
        _write(axes[2], "No difference:\n" + ",\n".join(fill(reason, 40) for reason in reasons) + ".")
        return
    if (ks, alphas) != ([*fields["ks"]], [*fields["alphas"]]):
        _write(axes[2], "No difference:\nour grid has other points.")
        return
    difference = 100 * values - printed
    most = abs(difference).max() or 1.0
    style = {"cmap": "PuOr_r", "vmin": -most, "vmax": most}
    heat_map(axes[2], ks, alphas, difference, f"{title},\nours less the paper's", 1, "difference, points", **style)


def _draw_ours(axis, spec: Spec, place: tuple[str, str, str], record: dict, **limits) -> None:
    block, row, column = place
    before = unpack(record["grid_vanilla"])
    prefix = f"{block}, " if len(spec.blocks) > 1 else ""
    title = (
        f"{prefix}{spec.columns[column].get('task', column)}: {spec.rows[row]['label']}\n"
        f"{record['measure']}, vanilla {100 * sum(before) / len(before):.1f}"
    )
    ks, alphas, values = grid_of(record["grid_scores"])
    heat_map(axis, ks, alphas, 100 * values, title, 1, f"{record['measure']}, %", **limits)


def _write(axis, text: str) -> None:
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
