"""How many AUs a row changes: the paper's column "#Acts"."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.cell import UNSTEERED
from paper.render.values import Value

AUS = "AUs"
PRINTED = "acts"  # its key in the paper's numbers
DENSE = 0.25  # of a site's AUs: steering more of them is not what the paper calls fine-grained


def changed(records: Sequence[dict]) -> Value:
    """Over the columns of a row, and the draws of a control."""
    touched = [_touched(record) for record in records if _touched(record) is not None]
    if not touched:
        return Value("")
    there = {record["aus"] for record in records if "aus" in record}
    of = f"of {_span(there)}" if there else ""
    return Value(_span(touched), of, ids=[record["id"] for record in records])


def dense(records: dict[str, dict[str, list[dict]]], labels: dict[str, str]) -> list[str]:
    """A sentence on the rows that are not sparse."""
    said = []
    for row, columns in records.items():
        parts = []
        for column, found in columns.items():
            share = max((_touched(one) / one["aus"] for one in found if "aus" in one), default=0.0)
            if share > DENSE:
                parts.append(f"{column} {100 * share:.0f} %")
        if parts:
            said.append(f"{labels[row]} ({', '.join(parts)})")
    return [f"Not sparse (more than a quarter of the site's AUs): {'; '.join(said)}."] if said else []


def _touched(record: dict) -> int | None:
    return 0 if record["method"] in UNSTEERED else record.get("touched")


def _span(numbers) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
