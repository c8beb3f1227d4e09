"""Set the stars and bold faces of a block, by tests that are adjusted for all comparisons of their kind in it."""

from __future__ import annotations

from collections.abc import Sequence

from eval.statistics import holm, mcnemar, paired_gain
from experiments.parts_report import LEVEL
from paper.render.values import Value

Table = dict[str, dict[str, Value]]


def mark_significance(table: Table, columns: Sequence[str], vanilla: dict[str, str]) -> None:
    """Mark the values of a table. vanilla: {"column": name} where vanilla is a column instead of a row."""
    columns = [column for column in columns if column != vanilla.get("column")]
    _stars(table, columns, _vanilla(table, columns, vanilla))
    _bold(table, columns)


def _vanilla(table: Table, columns: Sequence[str], where: dict[str, str]) -> dict[str, Value]:
    if "column" not in where:
        return table.get("vanilla", {})
    first = next((cells[where["column"]] for cells in table.values() if cells[where["column"]].hits), None)
    return dict.fromkeys(columns, first) if first else {}


def _stars(table: Table, columns: Sequence[str], vanilla: dict[str, Value]) -> None:
    """Star every single run that differs from vanilla. The draws of a control are a band without stars."""
    runs, ps = [], []
    for cells in table.values():
        for column in columns:
            value, base = cells[column], vanilla.get(column)
            if base and base.hits and len(value.hits) == 1 and value.fair and value is not base:
                gained, lost, p = mcnemar(base.hits[0], value.hits[0])
                value.gain = tuple(100 * edge for edge in paired_gain(gained, lost, len(base.hits[0])))
                runs.append(value)
                ps.append(p)
    for value, p in zip(runs, holm(ps), strict=True):
        value.p, value.significant = p, p < LEVEL


def _bold(table: Table, columns: Sequence[str]) -> None:
    """Set the best run of a column in bold if it beats every other row there, and every draw of a control."""
    best_runs, ps = [], []
    for column in columns:
        rows = [cells[column] for cells in table.values() if cells[column].hits and cells[column].fair]
        runs = [value for value in rows if len(value.hits) == 1]
        if runs and len(rows) > 1:
            best = max(runs, key=lambda value: value.number)
            others = [value for value in rows if value is not best]
            best_runs += [best] * len(others)
            ps += [max(p_better(best.hits[0], draw) for draw in value.hits) for value in others]
    for best, p in zip(best_runs, holm(ps), strict=True):
        best.p_best = max(p, best.p_best or 0.0)
        best.best = best.p_best < LEVEL


def p_better(best: Sequence[bool], other: Sequence[bool]) -> float:
    """Return the p-value if a run is better than another, else 1: the two-sided test alone does not say which is better."""
    return mcnemar(other, best)[2] if sum(best) > sum(other) else 1.0
