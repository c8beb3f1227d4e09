"""The places where methods are compared: one task at one site of one model, in the main table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paper.render.sections import Section
from paper.render.values import Row, Value

SITES = ("attention", "ffn")


def main_table(sections: Sequence[Section]) -> Section | None:
    """Return the first table that averages tasks; averages of seeds allow no test item by item."""
    return next((s for s in sections if s.blocks and s.spec.averages and s.spec.show.get("over") != "seeds"), None)


def by_method(section: Section, rows: Sequence[Row]) -> dict[tuple[str, str | None], Row]:
    """Return rows by method and site, without those that were chosen on test or show the better of two sites."""
    first_rows: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        fields = section.spec.rows[row.key]
        if "sites" not in fields and not fields.get("test_chosen"):
            first_rows.setdefault((fields["method"], fields.get("site")), row)
    return first_rows


def places(main: Section | None) -> Iterator[tuple[str, str, dict[tuple[str, str | None], Value]]]:
    """Yield (task, site, the column's cells by method and site) of every model of the main table."""
    if main is None:
        return
    for block in main.blocks:
        if block.name not in main.spec.blocks:
            continue
        rows = by_method(main, block.rows)
        for column in next(iter(main.spec.averages.values())):
            cells = {key: row.values[block.columns.index(column)] for key, row in rows.items()}
            suffix = f" of {block.name}" if len(main.spec.blocks) > 1 else ""
            for site in SITES:
                yield f"{column}{suffix}", site, {key: value for key, value in cells.items() if value.hits}
