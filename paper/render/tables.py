"""Records -> the numbers of a table: ours, the paper's, n, interval, and what the tests support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from eval.statistics import wilson
from experiments.records import unpack
from paper.manifest import Manifest
from paper.render.changed_aus import AUS, PRINTED, changed, dense
from paper.render.marks import mark
from paper.render.read_off import counts, human, noise, overhead, prediction, settings
from paper.render.searches import searches
from paper.render.seeds import over_seeds
from paper.render.shown import chosen_text, nothing_beat_vanilla, shown
from paper.render.values import Block, Row, Value
from paper.specs import Spec


def blocks(spec: Spec, manifest: Manifest) -> list[Block]:
    make = {"accuracy": accuracy, "lines": accuracy, "settings": settings, "counts": counts, "noise": noise,
            "prediction": prediction, "human": human, "overhead": overhead}[spec.kind]  # fmt: skip
    found = []
    for block in spec.blocks or spec.panels_by_name:
        found.append(make(spec, manifest, block))
        if "searches" in spec.show:
            found.append(searches(spec, manifest, block))
    return found


def accuracy(spec: Spec, manifest: Manifest, block: str) -> Block:
    table: dict[str, dict[str, Value]] = {}
    sizes: dict[str, int] = {}
    records: dict[str, dict[str, list[dict]]] = {}
    for row in spec.rows:
        table[row], records[row] = {}, {}
        for column, says in spec.columns.items():
            found = records[row][column] = shown(spec, manifest, block, row, column)
            table[row][column] = _accuracy(found, says, manifest, spec, block, row, column)
            table[row][column].ids = [record["id"] for record in found]
            if found:
                sizes[column] = found[0]["n"]
    columns, notes = list(spec.columns), []
    mark(table, columns, spec.show.get("vanilla", {}))
    for name, parts in spec.averages.items():
        if spec.show.get("over") == "seeds":
            columns += over_seeds(table, name, parts)
        else:
            columns.append(name)
            for cells in table.values():
                cells[name] = _average([cells[part] for part in parts])
    if spec.kind == "accuracy" and spec.show.get("aus", True):
        notes += dense(records, {row: says["label"] for row, says in spec.rows.items()})
        found = [one for row in records.values() for several in row.values() for one in several]
        printed = spec.printed.get(block, {}).values()
        if any(one.get("touched") is not None for one in found) or any(PRINTED in row for row in printed):
            columns.insert(0, AUS)
            for row, cells in table.items():
                cells[AUS] = changed([one for found in records[row].values() for one in found])
    for row, cells in table.items():
        for column in columns:
            key = PRINTED if column == AUS else column
            cells[column].printed = spec.printed.get(block, {}).get(row, {}).get(key)
    for column in columns:
        _place([cells[column] for cells in table.values()])
    rows = [
        Row(row, spec.rows[row]["label"], spec.rows[row].get("ours", False), [cells[column] for column in columns])
        for row, cells in table.items()
        if any(value.number is not None or value.printed is not None or value.why for value in cells.values())
    ]
    return Block(block, columns, [f"{c} (n = {sizes[c]})" if c in sizes else c for c in columns], rows, notes)


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
        return _band(shares, hits)
    record = records[0]
    low, high = (100 * edge for edge in wilson(record["right"], record["n"]))
    facts, fair = [], True
    if record["site"]:
        if record["settings"] is None:
            facts.append(nothing_beat_vanilla(manifest.records(spec.name, block, row, column)))
        else:
            facts.append(f"{record['site']}, {chosen_text(record)}")
        if record["search"] == "test" or spec.rows[row].get("test_chosen"):
            facts.append("chosen on the test split, so not tested on it")
            fair = False
    facts += [f"{key} {value:.3g}" for key, value in record["extras"].items() if key.startswith("perplexity")]
    return Value(f"{shares[0]:.1f}", f"[{low:.1f}, {high:.1f}]", facts, number=shares[0], hits=hits, fair=fair)


def _band(shares: Sequence[float], hits: list[list[bool]]) -> Value:
    """A control: the median of its draws (sorted), and their range."""
    low, middle, high = shares[0], median(shares), shares[-1]
    facts = [f"median and range of {len(shares)} draws"]
    return Value(f"{middle:.1f}", f"{low:.1f} to {high:.1f}", facts, number=middle, hits=hits, band=(low, high))


def _place(column: Sequence[Value]) -> None:
    """Place the bands of controls between the lowest and the highest number of their column."""
    edges = [edge for value in column if value.number is not None for edge in (value.number, *(value.band or ()))]
    for value in column:
        if value.band and max(edges) > min(edges):
            low, high = min(edges), max(edges)
            place = [(edge - low) / (high - low) for edge in (value.band[0], value.number, value.band[1])]
            value.place = tuple(place)


def _belongs(spec: Spec, block: str, row: str, column: str) -> bool:
    return any((entry.block, entry.row, entry.column) == (block, row, column) for entry in spec.entries)


def _win_rate(record: dict, manifest: Manifest, spec: Spec, block: str, row: str, column: str) -> Value:
    """The judge's, of answers against vanilla's, once `main.py judge` has left a result beside the records."""
    vanilla = manifest.records(spec.name, block, "vanilla", column)
    if record["method"] == "vanilla" or not vanilla:
        return Value(why="" if record["method"] == "vanilla" else "vanilla is missing")
    theirs = vanilla[0]["id"]
    if record["site"] and record["settings"] is None:
        return Value("0.0", facts=["nothing beat vanilla, so these are its own answers"], number=0.0)
    if spec.rows[row].get("draws", 1) == 1:
        for path in sorted(manifest.folder.glob(f"judge-{record['id']}-test-{theirs}-test-*.json")):
            result = manifest.load(path)
            low, high = result["delta_interval"]
            return Value(
                f"{result['delta']:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                [f"judge: {result['judge']}"],
                number=result["delta"],
            )
    answers = f"results/{manifest.scale}/answers"
    return Value(
        why=f"needs a judge: python main.py judge --cache results/{manifest.scale}/judge.jsonl --theirs "
        f"{answers}/{theirs}-test.jsonl --ours {answers}/RECORD-test.jsonl (RECORD: python main.py trace shows its id)"
    )


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
    ids = [id for value in values for id in value.ids]
    if draws > 1:
        return replace(_band(means, []), ids=ids)
    # shares as if two more had been right and two more wrong: an error of nothing would be too good
    counted = [(sum(value.hits[0]) + 2, len(value.hits[0]) + 4) for value in values]
    half = 196 * sum(right / n * (1 - right / n) / n for right, n in counted) ** 0.5 / len(values)
    low, high = max(0.0, means[0] - half), min(100.0, means[0] + half)
    return Value(f"{means[0]:.1f}", f"[{low:.1f}, {high:.1f}]", number=means[0], ids=ids)
