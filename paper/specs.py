"""Read the tables and figures from specs/*.json, and turn them into the cells and panels of a scale.

A spec of kind `accuracy`, `lines`, `heatmap` or `equal-kl` has blocks x rows x columns; its rows are its own and, by `with`,
groups that many tables share (rows.json). An entry is one cell or several: the draws of a control or of the pairs, or two
sites, of which the better on validation is shown. At equal KL a column is a level. Parts marked `all` are computed with
`--all` only; so are rows that a block's `rows` does not name. Fields of a cell are merged in the order scale, block, row,
column (experiments/cell.py has them all). A spec of kind `study` has panels, each a measurement of paper/studies/. Other kinds read the records of
another spec, their `source`. `printed` has the paper's numbers, and `dagger` says which of them the paper took from other
papers. docs/tables.md says how to add a spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.methods.registry import METHODS
from experiments.cell import AT_KL, FIELD_NAMES, LIVE, Cell, ModelSpec, TaskSpec, at_kl, bench_of, cell_of
from paper.dry_run import TINY_AUS, TINY_PAIRS, shrink

FOLDER = Path(__file__).parent / "specs"
SCALES = ("embedded", "real", "small", "paper")
COMPUTED = ("accuracy", "lines", "heatmap", "equal-kl")  # kinds whose entries are cells of their own
TABLE_FIELDS = {
    "label",
    "ours",
    "sites",
    "blocks",
    "columns",
    "only",
    "at",
    "judge",
    "x",
    "test_chosen",
    "draws",
    "pairs_draws",
    "later",
    "all",
    "rows",
}
SPEC_FIELDS = {"title", "kind", "says", "rows", "with", "scales", "printed", "dagger", "show", "source"}


@dataclass(frozen=True)
class Entry:
    """Hold the place of one number in a table, and the cells behind it."""

    block: str
    row: str
    column: str
    cells: tuple[Cell, ...]  # more than one: draws of a control or of the pairs, or sites of which one is shown
    draws: bool = False


@dataclass(frozen=True)
class Panel:
    """Hold one measurement of a study, which is one picture."""

    name: str
    study: str
    model: ModelSpec
    task: TaskSpec
    params: dict = field(hash=False)
    block: str = ""  # panels of one model that one table shows together: the model's name; else the panel's own
    printed: dict | list = field(default_factory=dict, hash=False)  # what the paper prints in this very picture

    def __str__(self) -> str:
        return f"{self.study} {self.name}"


@dataclass(frozen=True)
class Spec:
    name: str
    scale: str
    title: str
    kind: str
    says: str  # the paragraph below the title
    blocks: dict[str, dict] = field(default_factory=dict)
    rows: dict[str, dict] = field(default_factory=dict)
    columns: dict[str, dict] = field(default_factory=dict)
    averages: dict[str, list[str]] = field(default_factory=dict)  # name -> columns
    entries: tuple[Entry, ...] = ()
    panels: tuple[Panel, ...] = ()
    source: str = ""  # the spec whose records this one shows
    show: dict = field(default_factory=dict)  # options of its kind
    printed: dict = field(default_factory=dict)  # block -> row -> column
    dagger: dict = field(default_factory=dict)  # block -> row -> columns that the paper took from other papers

    @property
    def reads(self) -> set[str]:
        """Return the rows of the source that this spec shows."""
        by_kind = {
            "settings": lambda: {row for rows in self.show["rows"].values() for row in rows},
            "counts": lambda: {row for _, row in self.show["counts"].values()},
            "noise": lambda: set(self.rows),
            "parts": lambda: set(self.rows) - set(self.show["unsteered"]),
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
    """Return the names of all specs: tables, then figures, each by number, then our own."""

    def order(name: str) -> tuple:
        kind, number = re.fullmatch(r"(table|figure|)(.*)", name).groups()
        return ("table", "figure", "").index(kind), int(number) if number.isdigit() else 0, name

    return sorted((file.stem for file in FOLDER.glob("*.json") if file.stem not in ("models", "rows")), key=order)


def models() -> dict[str, dict]:
    return json.loads((FOLDER / "models.json").read_text())


def read(
    scale: str,
    only: Sequence[str] = (),
    model_names: Sequence[str] = (),
    checkpoints: dict[str, str] | None = None,
    weights: Sequence[str] = (),
    everything: bool = True,
    **shared,
) -> list[Spec]:
    """Read the specs of a scale.

    everything: whether to read what only `--all` computes; shared: fields of all cells; checkpoints: folders of other models
    to load instead, by hub id; weights: MODEL=FOLDER, where the weights of a model are.
    """
    known = names()
    for name in only:
        if name not in known:
            raise AUSteerError(f"there is no {name!r}: choose from {', '.join(known)}")
    for name in model_names:
        if name not in models():
            raise AUSteerError(f"there is no model {name!r} in the specs: choose from {', '.join(models())}")
    specs = [_read(name, scale, model_names, checkpoints or {}, everything, shared) for name in only or known]
    folders = dict(map(_weights_of, weights))
    return [_with_weights(spec, folders) for spec in specs if spec is not None]


def _weights_of(text: str) -> tuple[str, str]:
    """Parse MODEL=FOLDER into the model's hub id and the folder."""
    name, _, folder = text.partition("=")
    if name not in models() or not folder:
        raise AUSteerError(f"--weights takes MODEL=FOLDER, not {text!r}; the models: {', '.join(models())}")
    return models()[name]["hub"], folder


def _with_weights(spec: Spec, folders: dict[str, str]) -> Spec:
    def found(model: ModelSpec) -> ModelSpec:
        return replace(model, weights=folders[model.name]) if model.name in folders else model

    entries = (
        replace(one, cells=tuple(replace(cell, model=found(cell.model)) for cell in one.cells)) for one in spec.entries
    )
    panels = (replace(panel, model=found(panel.model)) for panel in spec.panels)
    return replace(spec, entries=tuple(entries), panels=tuple(panels))


def _read(
    name: str, scale: str, model_names: Sequence[str], checkpoints: dict[str, str], everything: bool, shared: dict
) -> Spec | None:
    data = json.loads((FOLDER / f"{name}.json").read_text())
    unknown = sorted(set(data) - SPEC_FIELDS)
    if unknown:
        raise AUSteerError(
            f"{name}.json: a spec has no field {', '.join(unknown)}; its fields: {', '.join(sorted(SPEC_FIELDS))}"
        )
    here = data["scales"].get(scale)
    if here is None:
        return None

    def wanted(parts: dict[str, dict]) -> dict[str, dict]:
        return {key: part for key, part in parts.items() if everything or not part.get("all")}

    blocks = {
        key: block for key, block in wanted(here.get("blocks", {})).items() if _has_model(key, block, model_names)
    }
    if here.get("blocks") and not blocks:
        return None
    rows = {key: row for key, row in wanted(_rows(data)).items() if scale in row.get("only", SCALES)}
    columns, base = wanted(here.get("columns", {})), {**shared, **here.get("base", {})}
    limit = shared.get("limit")
    if limit is not None and "quick" in data.get("show", {}):  # a quick look at the rows that matter most
        rows = {key: row for key, row in rows.items() if key in data["show"]["quick"]}
    base |= {"limit": limit} if limit is not None else {}
    entries = []
    if data["kind"] in COMPUTED:
        for block, block_fields in blocks.items():
            for row, row_fields in rows.items():
                for column, column_fields in columns.items():
                    has_row = everything or row in block_fields.get("rows", rows)
                    if (
                        has_row
                        and block in row_fields.get("blocks", blocks)
                        and column in row_fields.get("columns", columns)
                    ):
                        at = row_fields.get("at", {}).get(block, {}).get(column, {})
                        layers = [base, block_fields, row_fields, column_fields, at]
                        entries.append(_entry(block, row, column, layers, checkpoints, limit))
    # the paper's numbers never stand beside another model's
    printed = data.get("printed", {}) if scale != "embedded" and not checkpoints else {}
    panels = tuple(
        panel
        for key, fields in wanted(here.get("panels", {})).items()
        if _has_model(key, fields, model_names)
        for panel in _panels(key, fields, base, checkpoints, printed)
    )
    if here.get("panels") and not panels:
        return None
    return Spec(
        name, scale, data["title"], data["kind"], data["says"], blocks, rows, columns, here.get("averages", {}),
        tuple(entries), panels, data.get("source", ""), {**data.get("show", {}), **here.get("show", {})}, printed,
        data.get("dagger", {}),
    )  # fmt: skip


def _rows(data: dict) -> dict[str, dict]:
    """Return the spec's own rows, and those of its groups (rows.json) that it does not have under another name."""
    own, groups = data.get("rows", {}), json.loads((FOLDER / "rows.json").read_text())
    own_fields = [_unlabelled(row) for row in own.values()]
    shared_rows = {
        key: row
        for name in data.get("with", ())
        for key, row in groups[name].items()
        if _unlabelled(row) not in own_fields
    }
    return own | shared_rows


def _unlabelled(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("label", "ours", "later")}


def _has_model(name: str, block: dict, model_names: Sequence[str]) -> bool:
    return not model_names or block.get("model", name) in model_names


def _entry(
    block: str, row: str, column: str, layers: list[dict], checkpoints: dict[str, str], limit: int | None
) -> Entry:
    layers = [*layers, _limited(layers, limit)]
    merged = {key: value for layer in layers for key, value in layer.items()}
    unknown = sorted(set(merged) - FIELD_NAMES - TABLE_FIELDS)
    if unknown:
        raise AUSteerError(
            f"row {row}, column {column}: there is no field {', '.join(unknown)}; docs/tables.md lists all"
        )
    flat, draws = _flat(layers, checkpoints), merged.get("draws", 1)
    sites = merged.get("sites") or [merged.get("site")]
    random = METHODS[merged["method"]].draws if merged["method"] in METHODS else False
    cells = [
        # a control draws anew with every draw of the pairs, else its runs would all steer the same AUs
        cell_of(**flat | {"site": site, "draw": draw + (pairs_draw or 0) * random, "pairs_draw": pairs_draw})
        for pairs_draw in merged.get("pairs_draws", [flat.get("pairs_draw")])
        for site in sites
        for draw in range(draws)
    ]
    if flat.get("search") == AT_KL:
        cells = [cell if cell.method.name == "vanilla" else at_kl(cell, flat["level"]) for cell in cells]
    return Entry(block, row, column, tuple(dict.fromkeys(cells)), draws > 1)


def _limited(layers: list[dict], limit: int | None) -> dict:
    """Return what a limit makes of a cell: fewer items, and where pairs are drawn, as few of them and one draw."""
    if limit is None:
        return {}
    merged = {key: value for layer in layers for key, value in layer.items()}
    limited = {"limit": min(merged.get("limit") or limit, limit)}
    if "pairs_draws" in merged:
        limited |= {"n_pairs": min(merged["n_pairs"] or limit, limit), "pairs_draws": [merged["pairs_draws"][0] or 0]}
    return limited


def _panels(key: str, fields: dict, base: dict, checkpoints: dict[str, str], printed: dict) -> list[Panel]:
    """Return the panel, or one for each of its tasks."""
    params = shrink(fields["params"]) if checkpoints else fields["params"]
    own = printed.get(fields["model"], {}).get(key, {})
    tasks = {f"{key}, {task}": task for task in fields["tasks"]} if "tasks" in fields else {key: fields["task"]}
    panels = []
    for name, task in tasks.items():
        model, task_spec = bench_of(**_flat([base, fields, {"task": task, "engine": LIVE}], checkpoints))
        panels.append(Panel(name, fields["study"], model, task_spec, params, key, own))
    return panels


def _flat(layers: list[dict], checkpoints: dict[str, str]) -> dict:
    """Merge the fields of a cell; a model of models.json gets its checkpoint and precision from there."""
    flat = {key: value for layer in layers for key, value in layer.items() if key in FIELD_NAMES}
    # options add up: a block may name an SAE, and a column a readout
    flat["options"] = list(dict(option for layer in layers for option in layer.get("options", ())).items())
    known = models().get(flat["model"])
    if known is not None:
        flat["model"] = checkpoints.get(known["hub"], known["hub"])
        flat.setdefault("quantization", known.get("quantization"))
        flat["engine"] = known.get("engine", flat.get("engine", LIVE))
    if checkpoints:
        flat["ks"] = tuple(dict.fromkeys(min(k, TINY_AUS) for k in flat.get("ks", ())))
        flat["n_pairs"] = TINY_PAIRS
    return flat


def with_sources(specs: Sequence[Spec], sources: Sequence[Spec]) -> list[Spec]:
    """Add to these specs the entries of their sources that they show."""
    rows_read: dict[str, set[str]] = {}
    for spec in specs:
        rows_read.setdefault(spec.source, set()).update(spec.reads)
    narrowed = [
        replace(source, entries=tuple(entry for entry in source.entries if entry.row in rows_read[source.name]))
        for source in sources
    ]
    return [*specs, *narrowed]
