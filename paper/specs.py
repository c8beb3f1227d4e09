"""The tables and figures as data: specs/*.json -> what has to be computed at a scale.

A spec of kind `accuracy`, `lines` or `heatmap` has blocks x rows x columns; its rows are its own and, by `with`, groups
that many tables have (rows.json). Each entry is a cell, or several (draws of a control; sites of which the better on
validation is shown). What a scale, a block, a row and a column say is laid over one another in this order and becomes a
`setting.Setting` and a method. A spec of kind `study` has panels, each a measurement of `studies/`. Other kinds are read
off the records of another spec. `printed` is what the paper prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from austeer.errors import AUSteerError
from experiments.engines.vllm_batches import LIVE
from experiments.setting import UNSTEERED, Cell, Setting, asked_once
from paper.dry_run import TINY_AUS, TINY_PAIRS, fitted

FOLDER = Path(__file__).parent / "specs"
SCALES = ("embedded", "small", "paper")
COMPUTED = ("accuracy", "lines", "heatmap")  # kinds whose entries are cells of their own
SHARED = {one.name for one in fields(Setting)}
OF_THE_CELL = {"method", "site", "draws"}
OF_THE_TABLE = {"label", "ours", "sites", "blocks", "columns", "only", "at", "judge", "x", "test_chosen"}


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
    setting: Setting
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
    def panels_by_name(self) -> dict[str, Panel]:
        return {panel.name: panel for panel in self.panels}

    @property
    def label(self) -> str:
        kind, number = re.fullmatch(r"(table|figure|)(.*)", self.name).groups()
        return f"{kind} {number}".strip().capitalize()


def names() -> list[str]:
    """Tables first, then figures, each by number; then what is ours."""

    def order(name: str) -> tuple:
        kind, number = re.fullmatch(r"(table|figure|)(.*)", name).groups()
        return ("table", "figure", "").index(kind), int(number) if number.isdigit() else 0, name

    return sorted((file.stem for file in FOLDER.glob("*.json") if file.stem not in ("models", "rows")), key=order)


def models() -> dict[str, dict]:
    return json.loads((FOLDER / "models.json").read_text())


def read(
    scale: str, only: Sequence[str] = (), of_models: Sequence[str] = (), instead: dict[str, str] | None = None, **shared
) -> list[Spec]:
    """The specs of a scale. shared: of all settings. instead: checkpoints to use, by hub id."""
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
        Panel(
            key,
            panel["study"],
            _setting([base, panel, {"engine": LIVE}], instead),
            fitted(panel["params"]) if instead else panel["params"],
        )
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
    unknown = set(merged) - SHARED - OF_THE_CELL - OF_THE_TABLE
    if unknown:
        raise AUSteerError(f"{', '.join(sorted(unknown))}: no such setting, in row {row}, column {column} of a spec")
    setting, method = _setting(layers, instead), merged["method"]
    if method in UNSTEERED:  # whatever a row says of steering: asked once for all tables
        setting = replace(asked_once(setting, method).setting, encoder=None)
    draws = merged.get("draws", 1)
    sites = merged.get("sites") or [merged.get("site")]
    made = tuple(Cell(setting, method, site, draw) for site in sites for draw in range(draws))
    return Entry(block, row, column, made, draws > 1)


def _setting(layers: list[dict], instead: dict[str, str]) -> Setting:
    merged = {key: value for layer in layers for key, value in layer.items() if key in SHARED}
    known = models().get(merged["model"])
    if known is not None:
        merged["model"] = instead.get(known["hub"], known["hub"])
        merged.setdefault("quantization", known.get("quantization"))
        merged["engine"] = known.get("engine", merged.get("engine", LIVE))
    for key in ("ks", "alphas"):
        merged[key] = tuple(merged.get(key, ()))
    if instead:
        merged["ks"] = tuple(dict.fromkeys(min(k, TINY_AUS) for k in merged["ks"]))
        merged["n_pairs"] = TINY_PAIRS
    merged["options"] = tuple(tuple(option) for option in merged.get("options", ()))
    return Setting(**merged)
