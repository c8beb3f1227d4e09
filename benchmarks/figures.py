"""How the figures of a benchmark are shown and kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def show(figures: dict) -> None:
    """A line per figure."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def keep(figures: dict, out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns, so many, are words; the others are numbers, to the right. Short rows are filled up."""
    ruler = [*["---"] * words, *["--:"] * (len(head) - words)]
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(ruler)}|", *(f"| {' | '.join(row)} |" for row in filled)])
