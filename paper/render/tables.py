"""Turn records into the numbers of a table: ours, the paper's, n, intervals, and what the tests support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from eval.statistics import wilson
from experiments.records import unpack
from paper.comparable import OF_ANOTHER_PAPER, OUR_JUDGE_PROMPT, judge_differences
from paper.manifest import Manifest
from paper.render.changed_aus import AUS, PRINTED, changed, not_sparse
from paper.render.conditions import conditions, unlike, without_difference
from paper.render.derived_tables import counts, human, noise, overhead, prediction, settings
from paper.render.equal_kl import equal_kl
from paper.render.parts import parts as parts_of_gains
from paper.render.searches import searches
from paper.render.seeds import over_seeds
from paper.render.selection import chosen_text, nothing_beat_vanilla, selected_records
from paper.render.significance_marks import mark_significance
from paper.render.values import Block, Row, Value
from paper.specs import Spec

DAGGER = "† The paper did not run this itself: it took the number from Wang et al. (2025a; 2025b)."


def blocks(spec: Spec, manifest: Manifest) -> list[Block]:
    if spec.kind == "equal-kl":
        return [made for block in spec.blocks for made in equal_kl(spec, manifest, block)]
    make = {"accuracy": accuracy, "lines": accuracy, "settings": settings, "counts": counts, "noise": noise,
            "parts": parts_of_gains, "prediction": prediction, "human": human, "overhead": overhead}[spec.kind]  # fmt: skip
    result = []
    for block in spec.blocks or dict.fromkeys(panel.block for panel in spec.panels):
        result.append(make(spec, manifest, block))
        if "searches" in spec.show:
            result.append(searches(spec, manifest, block))
    for one in result:
        one.notes += without_difference(one.rows, one.columns)
    return result


def accuracy(spec: Spec, manifest: Manifest, block: str) -> Block:
    table: dict[str, dict[str, Value]] = {}
    sizes: dict[str, int] = {}
    records: dict[str, dict[str, list[dict]]] = {}
    for row in spec.rows:
        table[row], records[row] = {}, {}
        for column, column_fields in spec.columns.items():
            cell_records = records[row][column] = selected_records(spec, manifest, block, row, column)
            table[row][column] = _accuracy(cell_records, column_fields, manifest, spec, block, row, column)
            table[row][column].ids = [record["id"] for record in cell_records]
            if spec.printed:
                table[row][column].unlike += unlike(cell_records)
            if cell_records:
                sizes[column] = cell_records[0]["n"]
                table[row][column].by = table[row][column].by or cell_records[0]["measured"].get("scorer", "")
    columns, labels = list(spec.columns), {row: fields["label"] for row, fields in spec.rows.items()}
    notes = conditions(records, labels)
    mark_significance(table, columns, spec.show.get("vanilla", {}))
    for name, parts in spec.averages.items():
        if spec.show.get("over") == "seeds":
            columns += over_seeds(table, name, parts)
        else:
            columns.append(name)
            for cells in table.values():
                cells[name] = _average([cells[part] for part in parts])
    if spec.kind == "accuracy" and spec.show.get("aus", True):
        notes += not_sparse(records, labels)
        cell_records = [record for row in records.values() for several in row.values() for record in several]
        printed = spec.printed.get(block, {}).values()
        if any(record.get("touched") is not None for record in cell_records) or any(PRINTED in row for row in printed):
            columns.insert(0, AUS)
            for row, cells in table.items():
                cells[AUS] = changed([record for cell_records in records[row].values() for record in cell_records])
    for row, cells in table.items():
        for column in columns:
            key = PRINTED if column == AUS else column
            cells[column].printed = spec.printed.get(block, {}).get(row, {}).get(key)
            if key in spec.dagger.get(block, {}).get(row, ()):
                cells[column].dagger = True
                cells[column].unlike.append(OF_ANOTHER_PAPER)
    for column in columns:
        _place([cells[column] for cells in table.values()])
    notes += [DAGGER] if spec.printed and spec.dagger.get(block) else []
    rows = [
        Row(row, labels[row], spec.rows[row].get("ours", False), [cells[column] for column in columns])
        for row, cells in table.items()
        if any(value.number is not None or value.printed is not None or value.why for value in cells.values())
    ]
    heads = [_head(column, sizes.get(column), [cells[column] for cells in table.values()]) for column in columns]
    return Block(block, columns, heads, rows, notes)


def _head(column: str, n: int | None, values: Sequence[Value]) -> str:
    """Return the heading of a column with n, and with the scorer or judge that measured it."""
    measured = [] if n is None else [f"n = {n}", *dict.fromkeys(value.by for value in values if value.by)]
    return f"{column} ({', '.join(measured)})" if measured else column


def _accuracy(
    records: list[dict], column_fields: dict, manifest: Manifest, spec: Spec, block: str, row: str, column: str
) -> Value:
    if not records:
        is_known = f"{block}|{row}|{column}" in manifest.entries.get(spec.name, {})
        why = manifest.why_missing(spec.name, block, row, column)
        return Value(why=why if is_known or why != "not run" or _belongs(spec, block, row, column) else "")
    if column_fields.get("judge"):
        return _win_rate(records[0], manifest, spec, block, row, column)
    hits = [unpack(record["outcomes"]) for record in records]
    shares = sorted(100 * sum(outcomes) / len(outcomes) for outcomes in hits)
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
    """Return a control's value: the median of its sorted draws, and their range."""
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
    """Return the judge's win rate against vanilla, once `main.py judge` has left a result in the folder."""
    vanilla = manifest.records(spec.name, block, "vanilla", column)
    if record["method"] == "vanilla" or not vanilla:
        return Value(why="" if record["method"] == "vanilla" else "vanilla is missing")
    theirs = vanilla[0]["id"]
    if record["site"] and record["settings"] is None:
        return Value("0.0", facts=["nothing beat vanilla, so the answers are vanilla's"], number=0.0)
    if spec.rows[row].get("draws", 1) == 1:
        paths = sorted(manifest.folder.glob(f"judge-{record['id']}-test-{theirs}-test-*.json"))
        if results := [manifest.load(path) for path in paths]:
            # the one judged most as in the paper, so that all rows of a column show the same judge
            result = min(results, key=lambda verdicts: len(judge_differences(verdicts)))
            low, high = result["delta_interval"]
            return Value(
                f"{result['delta']:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                [OUR_JUDGE_PROMPT],
                number=result["delta"],
                by=f"judge {result['judge']}, {'one order' if result['orders'] == 'one' else 'both orders'}",
                unlike=judge_differences(result),
            )
    answers = f"results/{manifest.scale}/answers"
    return Value(
        why=f"needs a judge: python main.py judge --cache results/{manifest.scale}/judge.jsonl --theirs "
        f"{answers}/{theirs}-test.jsonl --ours {answers}/RECORD-test.jsonl (RECORD: python main.py trace shows its id)"
    )


def _average(values: Sequence[Value]) -> Value:
    """Average columns, with a normal interval from the columns' own errors; average a control draw by draw."""
    if not any(value.hits or value.why for value in values):
        return Value()  # a row that this block does not have
    if any(not value.hits for value in values):
        missing = next(value for value in values if not value.hits)
        return Value(why=f"a part is missing: {missing.why}" if missing.why else "a part is missing")
    draws = min(len(value.hits) for value in values)
    means = sorted(
        float(np.mean([100 * sum(value.hits[draw]) / len(value.hits[draw]) for value in values]))
        for draw in range(draws)
    )
    ids = [id for value in values for id in value.ids]
    reasons = list(dict.fromkeys(reason for value in values for reason in value.unlike))
    if draws > 1:
        return replace(_band(means, []), ids=ids, unlike=reasons)
    # as if two more items were right and two more wrong: an error of zero would be too good to be true
    adjusted = [(sum(value.hits[0]) + 2, len(value.hits[0]) + 4) for value in values]
    half = 196 * sum(right / n * (1 - right / n) / n for right, n in adjusted) ** 0.5 / len(values)
    low, high = max(0.0, means[0] - half), min(100.0, means[0] + half)
    return Value(f"{means[0]:.1f}", f"[{low:.1f}, {high:.1f}]", number=means[0], ids=ids, unlike=reasons)
