"""Write the notes below a table: how its numbers were made, and why some have no difference from the paper's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paper.comparable import differences
from paper.render.values import Row

Records = dict[str, dict[str, list[dict]]]  # by row and column
CONDITIONS = {  # title -> how to read it from a record, and whether it varies by column (otherwise by row)
    "Prompts": (lambda record: re.sub("; [0-9a-f]{12}", "", record["wording"]), True),  # without the hash of the texts
    "Pairs": (lambda record: record["pairs_by"], True),
    "Toxicity": (lambda record: record["measured"].get("scorer"), True),
    "Protocol": (lambda record: record["protocol"], False),
    "Attention kernel": (lambda record: record["kernel"].removeprefix("au_"), False),
}


def conditions(records: Records, labels: dict[str, str]) -> list[str]:
    """Return a note that names the prompts, pairs, scorer, protocol and kernel behind the numbers, if there are any."""
    sentences = []
    for title, (value_of, by_column) in CONDITIONS.items():
        places: dict[str, dict[str, None]] = {}
        for row, cells in records.items():
            for column, cell_records in cells.items():
                for value in filter(None, map(value_of, cell_records)):
                    places.setdefault(value, {})[column if by_column else labels[row]] = None
        if places:
            sentences.append(f"{title}: {_by_place(places)}.")
    return [" ".join(sentences)] if sentences else []


def _by_place(places: dict[str, dict[str, None]]) -> str:
    """List the values, each with the columns or rows it holds for; the most common one stands alone."""
    most = max(places, key=lambda value: len(places[value]))
    others = [f"{value} ({', '.join(where)})" for value, where in places.items() if value != most]
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
    return [f"No difference from the paper's number is given where {'; or '.join(sentences)}."] if sentences else []
