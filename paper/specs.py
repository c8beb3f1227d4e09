"""The tables and figures as data: specs/*.json -> the cells and panels of a scale.

A spec of kind `accuracy`, `lines` or `heatmap` has blocks x rows x columns; its rows are its own and, by `with`, groups
that many tables share (rows.json). Each entry is a cell, or several (draws of a control, or sites of which the better
on validation is shown). Fields of a cell are merged in the order scale, block, row, column (experiments/cell.py has
them all). A spec of kind `study` has panels, each a measurement of paper/studies/. Other kinds read the records of
another spec, their `source`. `printed` is what the paper prints. docs/tables.md says how to add one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from austeer.errors import AUSteerError
from experiments.cell import FIELD_NAMES, LIVE, Cell, ModelSpec, TaskSpec, bench_of, cell_of
from paper.dry_run import TINY_AUS, TINY_PAIRS, fitted

FOLDER = Path(__file__).parent / "specs"
SCALES = ("embedded", "small", "paper")
COMPUTED = ("accuracy", "lines", "heatmap")  # kinds whose entries are cells of their own
OF_THE_TABLE = {"label", "ours", "sites", "blocks", "columns", "only", "at", "judge", "x", "test_chosen", "draws"}
OF_THE_SPEC = {"title", "kind", "says", "rows", "with", "scales", "printed", "show", "source"}


@dataclass(frozen=True)
class Entry:
    """One number of a table."""

    block: str
    row: str
    column: str
    cells: tuple[Cell, ...]  # draws of a control, or sites of which one is shown
    draws: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture of a study."""

    name: str
    study: str
    model: ModelSpec
    task: TaskSpec
    params: dict = field(hash=False)

    def __str__(self) -> str:
        return f"{self.study} {self.name}"


@dataclass(frozen=True)
class Spec:
    name: str
    scale: str
    title: str
    kind: str
    says: str  # what the paper shows with it, and what is different here
    blocks: dict[str, dict] = field(default_factory=dict)
    rows: dict[str, dict] = field(default_factory=dict)
    columns: dict[str, dict] = field(default_factory=dict)
    averages: dict[str, list[str]] = field(default_factory=dict)  # of columns
    entries: tuple[Entry, ...] = ()
    panels: tuple[Panel, ...] = ()
    source: str = ""  # the spec whose records this one is read off
    show: dict = field(default_factory=dict)  # what its kind needs to know
    printed: dict = field(default_factory=dict)  # block -> row -> column

    @property
    def reads(self) -> set[str]:
        """Return the rows of the source that this spec is made of."""
        by_kind = {
            "settings": lambda: {row for rows in self.show["rows"].values() for row in rows},
            "counts": lambda: {row for _, row in self.show["counts"].values()},
            "noise": lambda: set(self.rows),
            "prediction": lambda: {*self.rows, *self.show["searched"].values()},
        }
        return by_kind[self.kind]() if self.kind in by_kind else set()

    @property
    def panels_by_name(self) -> dict[str, Panel]:
        return {panel.name: panel for panel in self.panels}

    @property
    def label(self) -> str:
        kind, number = re.fullmatch(r"(table|figure|)(.*)", self.name).groups()
        return f"{kind} {number}".strip().capitalize()


def names() -> list[str]:
    """Return all names: tables first, then figures, each by number; then our own."""

    def order(name: str) -> tuple:
        kind, number = re.fullmatch(r"(table|figure|)(.*)", name).groups()
        return ("table", "figure", "").index(kind), int(number) if number.isdigit() else 0, name

    return sorted((file.stem for file in FOLDER.glob("*.json") if file.stem not in ("models", "rows")), key=order)


def models() -> dict[str, dict]:
    return json.loads((FOLDER / "models.json").read_text())


def read(
    scale: str, only: Sequence[str] = (), of_models: Sequence[str] = (), instead: dict[str, str] | None = None, **shared
) -> list[Spec]:
    """Read the specs of a scale. shared: fields of all its cells. instead: checkpoints to use, by hub id."""
    known = names()
    for name in only:
        if name not in known:
            raise AUSteerError(f"there is no {name!r}; there are {', '.join(known)}")
    for name in of_models:
        if name not in models():
            raise AUSteerError(f"there is no model {name!r} in the specs; there are {', '.join(models())}")
    found = [_read(name, scale, of_models, instead or {}, shared) for name in only or known]
    return [spec for spec in found if spec is not None]


def _read(name: str, scale: str, of_models: Sequence[str], instead: dict[str, str], shared: dict) -> Spec | None:
    data = json.loads((FOLDER / f"{name}.json").read_text())
    unknown = sorted(set(data) - OF_THE_SPEC)
    if unknown:
        raise AUSteerError(f"{name}.json: a spec has no {', '.join(unknown)}; it has {', '.join(sorted(OF_THE_SPEC))}")
    here = data["scales"].get(scale)
    if here is None:
        return None
    blocks = {key: block for key, block in here.get("blocks", {}).items() if _wanted(key, block, of_models)}
    if here.get("blocks") and not blocks:
        return None
    rows = {key: row for key, row in _rows(data).items() if scale in row.get("only", SCALES)}
    columns, base = here.get("columns", {}), {**shared, **here.get("base", {})}
    base |= {key: value for key, value in shared.items() if key == "limit" and value is not None}
    entries = []
    if data["kind"] in COMPUTED:
        for block, its in blocks.items():
            for row, says in rows.items():
                for column, asks in columns.items():
                    if block in says.get("blocks", blocks) and column in says.get("columns", columns):
                        at = says.get("at", {}).get(block, {}).get(column, {})
                        entries.append(_entry(block, row, column, [base, its, says, asks, at], instead))
    panels = tuple(
        _panel(key, panel, [base, panel, {"engine": LIVE}], instead)
        for key, panel in here.get("panels", {}).items()
        if _wanted(key, panel, of_models)
    )
    # never beside another model's numbers
    printed = data.get("printed", {}) if scale != "embedded" and not instead else {}
    return Spec(
        name, scale, data["title"], data["kind"], data["says"], blocks, rows, columns, here.get("averages", {}),
        tuple(entries), panels, data.get("source", ""), {**data.get("show", {}), **here.get("show", {})}, printed,
    )  # fmt: skip


def _rows(data: dict) -> dict[str, dict]:
    """Its own, and groups of rows that many tables have (rows.json), but those it has under a name of its own."""
    own, groups = data.get("rows", {}), json.loads((FOLDER / "rows.json").read_text())
    asked = [_asked(row) for row in own.values()]
    more = {key: row for name in data.get("with", ()) for key, row in groups[name].items() if _asked(row) not in asked}
    return own | more


def _asked(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("label", "ours")}


def _wanted(name: str, block: dict, of_models: Sequence[str]) -> bool:
    return not of_models or block.get("model", name) in of_models


def _entry(block: str, row: str, column: str, layers: list[dict], instead: dict[str, str]) -> Entry:
    merged = {key: value for layer in layers for key, value in layer.items()}
    unknown = sorted(set(merged) - FIELD_NAMES - OF_THE_TABLE)
    if unknown:
        raise AUSteerError(f"{', '.join(unknown)}: no such field, in row {row}, column {column} of a spec")
    flat, draws = _flat(layers, instead), merged.get("draws", 1)
    sites = merged.get("sites") or [merged.get("site")]
    cells = tuple(cell_of(**flat | {"site": site, "draw": draw}) for site in sites for draw in range(draws))
    return Entry(block, row, column, cells, draws > 1)


def _panel(name: str, says: dict, layers: list[dict], instead: dict[str, str]) -> Panel:
    model, task = bench_of(**_flat(layers, instead))
    return Panel(name, says["study"], model, task, fitted(says["params"]) if instead else says["params"])


def _flat(layers: list[dict], instead: dict[str, str]) -> dict:
    """Merge the fields of a cell, with the checkpoint and the precision of a model that models.json names."""
    flat = {key: value for layer in layers for key, value in layer.items() if key in FIELD_NAMES}
    known = models().get(flat["model"])
    if known is not None:
        flat["model"] = instead.get(known["hub"], known["hub"])
        flat.setdefault("quantization", known.get("quantization"))
        flat["engine"] = known.get("engine", flat.get("engine", LIVE))
    if instead:
        flat["ks"] = tuple(dict.fromkeys(min(k, TINY_AUS) for k in flat.get("ks", ())))
        flat["n_pairs"] = TINY_PAIRS
    return flat


def with_sources(found: Sequence[Spec], sources: Sequence[Spec]) -> list[Spec]:
    """Add to these specs, of the sources that they read, the entries that they read."""
    wanted: dict[str, set[str]] = {}
    for spec in found:
        wanted.setdefault(spec.source, set()).update(spec.reads)
    narrowed = [
        replace(source, entries=tuple(entry for entry in source.entries if entry.row in wanted[source.name]))
        for source in sources
    ]
    return [*found, *narrowed]
