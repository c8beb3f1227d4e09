"""Show records at equal KL: gains over cost, skill, and what gains in likelihood are made of.

python -m experiments.kl_tables docs/real/records.jsonl        the tables of records that were kept, one JSON object a line
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from austeer.errors import AUSteerError, run_command
from austeer.files import read_text
from austeer.methods.registry import METHODS
from experiments import kl_report, parts_report

LABELS = {"vanilla": "vanilla", "prompt-only": "prompt only", **{name: m.label for name, m in METHODS.items()}}


def tables(rows: Sequence[dict]) -> list[str]:
    """Return the tables of one model and task."""
    text = [kl_report.heading(rows, LABELS), ""]
    for same_rows in measures(rows):
        text += [f"{kl_report.measure(same_rows)}:", "", kl_report.table(same_rows, LABELS), ""]
    if likelihoods := parts_report.likelihood_table(rows, LABELS):
        text += [likelihoods, ""]
    return text


def measures(rows: Sequence[dict]) -> list[Sequence[dict]]:
    """Return the rows as they are measured and, on tasks with two options, with skill as their measure."""
    return [rows, parts_report.as_skill(rows)] if parts_report.has_parts(rows) else [rows]


def kept(file: Path) -> dict[str, list[dict]]:
    """Read kept records by model and task, vanilla first, as they stand in the file."""
    by_title: dict[str, list[dict]] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            row = json.loads(line)
            by_title.setdefault(f"{row['model']}, {row['task']}", []).append(row)
        except (ValueError, TypeError, KeyError):
            raise AUSteerError(
                f"{file}, line {number} is no record: give a file of records, one JSON object a line"
            ) from None
    return {title: sorted(rows, key=lambda row: row["method"] != "vanilla") for title, rows in by_title.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="file of records, one JSON object a line")
    args = parser.parse_args(argv)
    for title, rows in kept(args.records).items():
        print("\n".join([f"## {title}", "", *tables(rows)]))


if __name__ == "__main__":
    run_command(main)
