"""Draw the picture beside the findings: every method's mean gain over vanilla, and the range of the controls."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paper.render.pictures import Picture
from paper.render.places import by_method
from paper.render.sections import Section
from paper.render.values import Block, Value
from paper.studies import picture

NAME = "findings.png"
STYLES = ((picture.BLUE, "o"), (picture.VERMILLION, "s"), (picture.GREEN, "D"), (picture.PURPLE, "^"))  # one per model
_SOURCES: dict[Path, Section] = {}  # what each file was drawn from: a section is made anew when its records change


def draw(main: Section, folder: Path) -> Picture | None:
    """Draw the main table's gains; None where it has no gain yet."""
    path, columns = folder / NAME, next(iter(main.spec.averages.values()))
    by_block = {block.name: _gains(main, block, columns) for block in main.blocks if block.name in main.spec.blocks}
    labels_with_gain = {label for gains in by_block.values() for label in gains}
    labels = [row["label"] for row in main.spec.rows.values() if row["label"] in labels_with_gain]
    if not labels:
        return None
    if _SOURCES.get(path) is not main or not path.exists():
        _draw(by_block, labels, path)
        _SOURCES[path] = main
    note = (
        f"Mean gain over vanilla on {', '.join(columns)}. Dots: one run with its 95 % interval over items. Grey: a control, "
        "the range of its draws with their median; the vertical band is the range of all of them."
    )
    return Picture(f"Gains over vanilla, from {main.spec.label}", path, note)


def _draw(by_block: dict[str, dict[str, tuple]], labels: list[str], path: Path) -> None:
    figure, axes = picture.subplots(1, (8.6, 1.3 + 0.4 * len(labels)), squeeze=False)
    axis = axes[0][0]
    axis.axvline(0, color=picture.BLACK, lw=1)
    for index, (gains, (color, marker)) in enumerate(zip(by_block.values(), STYLES, strict=False)):
        edges = [edge for low, _, high, draws in gains.values() if draws > 1 for edge in (low, high)]
        if edges:
            axis.axvspan(min(edges), max(edges), color=picture.GREY, alpha=0.13, lw=0)
        for label, (low, middle, high, draws) in gains.items():
            y = labels.index(label) + 0.22 * (index - (len(by_block) - 1) / 2)
            if draws > 1:
                axis.plot([low, high], [y, y], color=picture.GREY, lw=8, alpha=0.45, solid_capstyle="butt")
                axis.plot([middle], [y], "|", color=picture.BLACK, ms=11, mew=2)
            else:
                axis.plot([low, high], [y, y], color=color, lw=2)
                axis.plot([middle], [y], marker, color=color, ms=8)
    axis.set_yticks(range(len(labels)), [textwrap.fill(label, 32) for label in labels])
    axis.set(ylim=(len(labels) - 0.4, -0.6), xlabel="gain over vanilla, points")
    axis.grid(axis="x", alpha=0.3)
    names = {name: Line2D([], [], color=color, marker=marker, ms=8, lw=2)
             for name, (color, marker) in zip(by_block, STYLES, strict=False) if len(by_block) > 1}  # fmt: skip
    names["controls: range of draws, and median"] = Patch(color=picture.GREY, alpha=0.45, lw=0)
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=2, frameon=False)
    picture.save(figure, path)


def _gains(main: Section, block: Block, columns: list[str]) -> dict[str, tuple[float, float, float, int]]:
    """Return (low, middle, high, draws) of the rows that have every column, by label."""
    indices = [block.columns.index(column) for column in columns]
    rows = by_method(main, block.rows)
    if ("vanilla", None) not in rows:
        return {}
    vanilla = [rows[("vanilla", None)].values[index] for index in indices]
    gains = {}
    for row in rows.values():
        values = [row.values[index] for index in indices]
        if row is not rows[("vanilla", None)] and all(one.hits for one in (*values, *vanilla)):
            gains[row.label] = _mean_gain(values, vanilla)
    return gains


def _mean_gain(values: list[Value], vanilla: list[Value]) -> tuple[float, float, float, int]:
    """Average the paired gains over tasks, whose variances add up because each has its own items."""
    draws = min(len(value.hits) for value in values)
    pairs = [
        [np.subtract(value.hits[draw], base.hits[0], dtype=float) for value, base in zip(values, vanilla, strict=True)]
        for draw in range(draws)
    ]
    means = sorted(100 * float(np.mean([task.mean() for task in tasks])) for tasks in pairs)
    if draws > 1 or any(value.band for value in values):
        return means[0], float(np.median(means)), means[-1], max(draws, 2)
    half = 196 * sum(task.var() / len(task) for task in pairs[0]) ** 0.5 / len(values)
    return means[0] - half, means[0], means[0] + half, 1
