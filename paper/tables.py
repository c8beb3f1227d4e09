"""Records -> the numbers of a table: ours, the paper's, n, interval, and what the tests support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from eval.records import unpack
from eval.statistics import holm, mcnemar, selection_noise, wilson
from paper.manifest import Manifest
from paper.specs import Spec

SURE = 0.05


@dataclass
class Value:
    text: str = "–"
    detail: str = ""  # interval, band, what was chosen
    printed: float | None = None  # the paper's
    number: float | None = None
    why: str = ""  # of a dash
    best: bool = False  # better than every other row of its column, by the adjusted test
    sure: bool = False  # different from vanilla, by the adjusted test
    fair: bool = True  # nothing of it was chosen on the test split: it may be tested
    hits: list[list[bool]] = field(default_factory=list)  # per item, of every draw

    @property
    def difference(self) -> float | None:
        return None if self.number is None or self.printed is None else self.number - self.printed


@dataclass
class Block:
    name: str
    columns: list[str]
    heads: list[str]  # of the columns, with n
    rows: list[tuple[str, bool, list[Value]]]  # label, is it ours and not the paper's, a value a column


def blocks(spec: Spec, manifest: Manifest) -> list[Block]:
    make = {"accuracy": accuracy, "lines": accuracy, "settings": settings, "counts": counts, "noise": noise,
            "prediction": prediction, "human": human, "overhead": overhead}[spec.kind]  # fmt: skip
    return [make(spec, manifest, block) for block in (spec.blocks or spec.panels_by_name)]


def accuracy(spec: Spec, manifest: Manifest, block: str) -> Block:
    table: dict[str, dict[str, Value]] = {}
    sizes: dict[str, int] = {}
    for row in spec.rows:
        table[row] = {}
        for column, says in spec.columns.items():
            records = shown(spec, manifest, block, row, column)
            table[row][column] = _accuracy(records, says, manifest, spec, block, row, column)
            if records:
                sizes[column] = records[0]["n"]
    _mark(table, list(spec.columns))
    for name, parts in spec.averages.items():
        for cells in table.values():
            cells[name] = _average([cells[part] for part in parts])
    columns = [*spec.columns, *spec.averages]
    for row, cells in table.items():
        for column in columns:
            cells[column].printed = spec.printed.get(block, {}).get(row, {}).get(column)
    rows = [
        (spec.rows[row]["label"], spec.rows[row].get("ours", False), [cells[column] for column in columns])
        for row, cells in table.items()
        if any(value.number is not None or value.printed is not None or value.why for value in cells.values())
    ]
    return Block(block, columns, [f"{c} (n = {sizes[c]})" if c in sizes else c for c in columns], rows)


def shown(spec: Spec, manifest: Manifest, block: str, row: str, column: str) -> list[dict]:
    """The draws of a control, or the one record of an entry: of several sites, the better on validation."""
    records = manifest.records(spec.name, block, row, column)
    if len(records) < 2 or spec.rows[row].get("draws", 1) > 1:
        return records
    return [better(records)]


def better(records: Sequence[dict]) -> dict:
    """Of two sites the one that was better on the items both were asked on; of equal ones the first."""
    asked = [unpack(record["grid_outcomes"][record["chosen"]]) if record["chosen"] else [] for record in records]
    shared = min((len(outcomes) for outcomes in asked if outcomes), default=0)
    # where nothing beat vanilla, nothing was chosen
    scores = [sum(outcomes[:shared]) if outcomes else -1 for outcomes in asked]
    return records[max(range(len(records)), key=lambda i: (scores[i], -i))]


def _accuracy(
    records: list[dict], says: dict, manifest: Manifest, spec: Spec, block: str, row: str, column: str
) -> Value:
    if not records:
        there = f"{block}|{row}|{column}" in manifest.entries.get(spec.name, {})
        why = manifest.why_missing(spec.name, block, row, column)
        return Value(why=why if there or why != "not run" or _belongs(spec, block, row, column) else "")
    if says.get("judge"):
        return _win_rate(records[0], manifest, spec, block, row, column)
    hits = [unpack(record["outcomes"]) for record in records]
    shares = sorted(100 * sum(one) / len(one) for one in hits)
    if len(hits) > 1 or spec.rows[row].get("draws", 1) > 1:
        detail = f"{shares[0]:.1f} to {shares[-1]:.1f} in {len(hits)} draws"
        return Value(f"{median(shares):.1f}", detail, number=median(shares), hits=hits)
    record = records[0]
    low, high = (100 * edge for edge in wilson(record["right"], record["n"]))
    detail, fair = f"[{low:.1f}, {high:.1f}]", True
    if record["site"]:
        chosen = ", ".join(f"{key} {value:g}" for key, value in (record["settings"] or {}).items())
        detail += f"; {record['site']}, {chosen or 'nothing beat vanilla'}"
        if record["search"] == "test" or spec.rows[row].get("test_chosen"):
            detail += "; chosen on test"
            fair = False
    detail += "".join(f"; {key} {value:.3g}" for key, value in record["extras"].items() if key.startswith("perplexity"))
    return Value(f"{shares[0]:.1f}", detail, number=shares[0], hits=hits, fair=fair)


def _belongs(spec: Spec, block: str, row: str, column: str) -> bool:
    return any((entry.block, entry.row, entry.column) == (block, row, column) for entry in spec.entries)


def _win_rate(record: dict, manifest: Manifest, spec: Spec, block: str, row: str, column: str) -> Value:
    """The judge's, of answers against vanilla's, once `main.py judge` has left a result beside the records."""
    vanilla = manifest.records(spec.name, block, "vanilla", column)
    if record["method"] == "vanilla" or not vanilla:
        return Value(why="" if record["method"] == "vanilla" else "vanilla is missing")
    theirs = vanilla[0]["id"]
    if record["site"] and record["settings"] is None:
        return Value("0.0", "nothing beat vanilla: its own answers", number=0.0)
    if spec.rows[row].get("draws", 1) == 1:
        for path in sorted(manifest.folder.glob(f"judge-{record['id']}-test-{theirs}-test-*.json")):
            result = manifest.load(path)
            low, high = result["delta_interval"]
            detail = f"[{low:.1f}, {high:.1f}]; {result['judge']}"
            return Value(f"{result['delta']:.1f}", detail, number=result["delta"])
    answers = f"results/{manifest.scale}/answers"
    return Value(
        why=f"needs a judge: python main.py judge --cache results/{manifest.scale}/judge.jsonl --theirs "
        f"{answers}/{theirs}-test.jsonl --ours {answers}/RECORD-test.jsonl (RECORD: python main.py trace shows its id)"
    )


def _mark(table: dict[str, dict[str, Value]], columns: Sequence[str]) -> None:
    """Holm over all comparisons with vanilla of the block; and, within a column, of the best row with every other."""
    vanilla = table.get("vanilla", {})
    tested, ps = [], []
    for cells in table.values():
        for column in columns:
            value, base = cells[column], vanilla.get(column)
            if base and base.hits and len(value.hits) == 1 and value.fair and value is not base:
                tested.append(value)
                ps.append(mcnemar(base.hits[0], value.hits[0])[2])
    for value, p in zip(tested, holm(ps), strict=True):
        value.sure = p < SURE
    for column in columns:
        rows = [cells[column] for cells in table.values() if len(cells[column].hits) == 1 and cells[column].fair]
        if len(rows) > 1:
            best = max(rows, key=lambda value: value.number)
            others = [mcnemar(value.hits[0], best.hits[0])[2] for value in rows if value is not best]
            best.best = max(holm(others)) < SURE


def _average(values: Sequence[Value]) -> Value:
    """Of columns as they stand; the interval is normal, from the columns' own errors. Of draws, draw by draw."""
    if not any(value.hits or value.why for value in values):
        return Value()  # a row of other blocks
    if any(not value.hits for value in values):
        missing = next(value for value in values if not value.hits)
        return Value(why=f"a part is missing: {missing.why}" if missing.why else "a part is missing")
    draws = min(len(value.hits) for value in values)
    means = sorted(
        float(np.mean([100 * sum(value.hits[draw]) / len(value.hits[draw]) for value in values]))
        for draw in range(draws)
    )
    if draws > 1:
        return Value(
            f"{median(means):.1f}", f"{means[0]:.1f} to {means[-1]:.1f} in {draws} draws", number=median(means)
        )
    # shares as if two more had been right and two more wrong: an error of nothing would be too good
    counted = [(sum(value.hits[0]) + 2, len(value.hits[0]) + 4) for value in values]
    half = 196 * sum(right / n * (1 - right / n) / n for right, n in counted) ** 0.5 / len(values)
    low, high = max(0.0, means[0] - half), min(100.0, means[0] + half)
    return Value(f"{means[0]:.1f}", f"[{low:.1f}, {high:.1f}]", number=means[0])


def settings(spec: Spec, manifest: Manifest, block: str) -> Block:
    """What was chosen, at the site that was better on validation."""
    rows = []
    for row, sources in spec.show["rows"].items():
        values = []
        for column in spec.columns:
            found = [record for name in sources for record in manifest.records(spec.source, block, name, column)]
            value = Value(why="" if found else manifest.why_missing(spec.source, block, sources[0], column))
            if found:
                best = better(found)
                chosen = (best["settings"] or {}).get(spec.show["key"])
                value = Value("–" if chosen is None else f"{chosen:g}", best["site"], number=chosen)
                value.why = "nothing beat vanilla" if chosen is None else ""
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append((spec.rows[row]["label"], spec.rows[row].get("ours", False), values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def counts(spec: Spec, manifest: Manifest, block: str) -> Block:
    rows = []
    for row, key, source in (("pairs", "n_pairs", "austeer-head"), ("test", "n", "vanilla")):
        values = []
        for column in spec.columns:
            found = manifest.records(spec.source, block, source, column)
            value = Value(f"{found[0][key]}", number=found[0][key]) if found else Value()
            value.why = "" if found else manifest.why_missing(spec.source, block, source, column)
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append((spec.rows[row]["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def noise(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Points that the best of the grid gains by chance, of the site that is shown."""
    rows = []
    for row, says in spec.rows.items():
        values = []
        for column in spec.columns:
            found = [one for one in manifest.records(spec.source, block, row, column) if one.get("grid_outcomes")]
            if not found:
                values.append(Value(why=manifest.why_missing(spec.source, block, row, column)))
                continue
            # the number that is shown is the best of all sites' settings
            outcomes = {
                f"{one['site']} {key}": unpack(packed) for one in found for key, packed in one["grid_outcomes"].items()
            }
            vanilla = unpack(found[0]["grid_vanilla"])
            gained, size = 100 * selection_noise(outcomes, vanilla), len(vanilla)
            values.append(Value(f"{gained:+.1f}", f"best of {len(outcomes)} on {size} items", number=gained))
        rows.append((says["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def prediction(spec: Spec, manifest: Manifest, block: str) -> Block:
    rows = []
    for row, says in spec.rows.items():
        for key in ("predicted", "measured"):
            values = []
            for column in spec.columns:
                found = manifest.records(spec.source, block, row, column)
                number = found[0].get("foretold", {}).get(key) if found else None
                why = manifest.why_missing(spec.source, block, row, column)
                values.append(Value(f"{number:+.3f}", number=number) if number is not None else Value(why=why))
            rows.append((f"{says['label']}: {key}", True, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def human(spec: Spec, manifest: Manifest, block: str) -> Block:
    """What `main.py human score --out FOLDER/human-BLOCK.json` left."""
    path = manifest.folder / f"human-{block}.json"
    rated = manifest.load(path)["rows"] if path.exists() else []
    rated = [row for row in rated if row["task"] == "all tasks"] or rated
    rows = []
    for row, says in spec.rows.items():
        values = []
        for column in spec.columns:
            mine = next((one[column] for one in rated if one["system"].casefold() == row), None)
            value = Value(why=f"needs raters: main.py human export, and score --out {path.name} in this folder")
            if mine is not None:
                value = Value(f"{mine['mean']:.1f}", f"[{mine['low']:.1f}, {mine['high']:.1f}]", number=mine["mean"])
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append((says["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def overhead(spec: Spec, manifest: Manifest, block: str) -> Block:
    found = manifest.panel(spec.name, block)
    columns = {"prepare_s": "prepared in, s", "inference_s": "inference, s", "s_per_sample": "s a sample",
               "std": "± of trials", "gb": "memory, GB"}  # fmt: skip
    rows = []
    for row in ("vanilla", "iti", "sadi", "austeer", "causal"):
        measured = (found or {}).get("found", {}).get(row, {})
        printed = spec.printed.get(block, {}).get(row, {})
        values = []
        for column in columns:
            number = measured.get(column)
            value = Value(f"{number:.4g}", number=number) if number is not None else Value()
            value.why = "" if found else manifest.why_missing(spec.name, block, "panel", block)
            paper = printed.get({"gb": "gpu_gb"}.get(column, column))
            if column in ("prepare_s", "inference_s"):  # the paper's are of all seven tasks
                value.detail = "" if paper is None else f"paper, seven tasks: {paper:g}"
            else:
                value.printed = paper
            values.append(value)
        rows.append((row, row == "causal", values))
    items = (found or {}).get("params", {}).get("items", "?")
    return Block(f"{block} (n = {items})", list(columns), list(columns.values()), rows)
