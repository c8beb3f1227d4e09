"""Say below a block under what conditions its numbers were made, and where that rules out a difference from the paper's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paper.comparable import differences
from paper.render.values import Row

Records = dict[str, dict[str, list[dict]]]  # by row and column


def conditions(records: Records, labels: dict[str, str]) -> list[str]:
    """Return a note on whose prompts, pairs, scorer and protocol these are, or none."""
    whose: dict[str, dict[str, list[str]]] = {}
    for row, cells in records.items():
        for column, cell_records in cells.items():
            for record in cell_records:
                for title, (value, place) in _said(record, column, labels[row]).items():
                    if value:
                        places = whose.setdefault(title, {}).setdefault(value, [])
                        places += [place] if place not in places else []
    return [" ".join(f"{title}: {_by_place(values)}." for title, values in whose.items())] if whose else []


# columns have prompts, pairs and scorers of their own, rows protocols and kernels
def _said(record: dict, column: str, row: str) -> dict[str, tuple[str | None, str]]:
    return {
        "Prompts": (re.sub("; [0-9a-f]{12}", "", record["wording"]), column),  # without the hash of the texts
        "Pairs": (record["pairs_by"], column),
        "Toxicity": (record["measured"].get("scorer"), column),
        "Protocol": (record["protocol"], row),
        "Attention kernel": (record["kernel"].removeprefix("au_"), row),
    }


def _by_place(values: dict[str, list[str]]) -> str:
    """Return the values, the most common without its places."""
    most = max(values, key=lambda value: len(values[value]))
    others = [f"{value} ({', '.join(places)})" for value, places in values.items() if value != most]
    return "; ".join([most, *others])


def unlike(records: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(reason for record in records for reason in differences(record)))


def without_difference(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return a note with every reason why a number stands beside the paper's without a difference, or none."""
    places: dict[str, list[str]] = {}
    printed: list[str] = []
    for row in rows:
        for column, value in zip(columns, row.values, strict=True):
            if value.is_beside_a_number:
                printed.append(column)
                for reason in value.unlike:
                    places.setdefault(reason, []).append(column)
    sentences = [
        reason + ("" if len(where) == len(printed) else f" ({', '.join(dict.fromkeys(where))})")
        for reason, where in places.items()
    ]
    return [f"No difference from the paper's number where {'; or '.join(sentences)}."] if sentences else []
