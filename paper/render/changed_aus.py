"""The column of how many AUs a row changes: the paper's "#Acts"."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.cell import UNSTEERED
from paper.render.values import Value

AUS = "AUs"
PRINTED = "acts"  # its key in the paper's numbers
DENSE = 0.25  # share of a site's AUs: steering more of them is not what the paper calls fine-grained


def changed(records: Sequence[dict]) -> Value:
    """Return the AUs changed over the columns of a row and the draws of a control, fewest to most."""
    counts = [_n_steered(record) for record in records if _n_steered(record) is not None]
    if not counts:
        return Value("")
    totals = {record["aus"] for record in records if record.get("aus")}
    total = f"of {_span(totals)}" if totals else ""
    return Value(_span(counts), total, ids=[record["id"] for record in records])


def not_sparse(records: dict[str, dict[str, list[dict]]], labels: dict[str, str]) -> list[str]:
    """Return a note on the rows that are not sparse, or none."""
    sentences = []
    for row, columns in records.items():
        parts = []
        for column, cell_records in columns.items():
            share = max(
                (_n_steered(record) / record["aus"] for record in cell_records if record.get("aus")), default=0.0
            )
            if share > DENSE:
                parts.append(f"{column} {100 * share:.0f} %")
        if parts:
            sentences.append(f"{labels[row]} ({', '.join(parts)})")
    return (
        [
            f"These rows change more than a quarter of the AUs of their site and so are not sparse: {'; '.join(sentences)}."
        ]
        if sentences
        else []
    )


def _n_steered(record: dict) -> int | None:
    return 0 if record["method"] in UNSTEERED else record.get("touched")


def _span(numbers) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
