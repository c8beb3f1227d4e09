"""The command that lists the methods: `austeer methods`."""

from __future__ import annotations

from collections.abc import Sequence

from austeer import arguments
from austeer.methods.registry import METHODS, options_of

IN_PYTHON = """\
method = METHODS["caa"]                              # from austeer import METHODS
prepared = method.prepare(evidence)                  # evidence: austeer.Evidence(model, tokenizer, pairs, site, ranks)
plan = method.plan(prepared, method.grid("small")[0])"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    epilog = f"In Python:\n\n{IN_PYTHON}"
    arguments.parser(prog, "List the methods that make plans.", epilog=epilog).parse_args(argv)
    rows = [("method", "edits", "sites", "foldable", "options", "from")]
    for name, method in METHODS.items():
        foldable, options = "yes" if method.foldable else "no", " ".join(options_of(name)) or "-"
        rows.append((name, method.edits, " ".join(method.sites), foldable, options, method.paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
