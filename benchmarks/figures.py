"""Print the figures of a benchmark, and save them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def show(figures: dict) -> None:
    """Print one line per number."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def keep(figures: dict, out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table whose first `words` columns hold words and the others numbers; short rows are filled up."""
    ruler = [*["---"] * words, *["--:"] * (len(head) - words)]
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(ruler)}|", *(f"| {' | '.join(row)} |" for row in filled)])
