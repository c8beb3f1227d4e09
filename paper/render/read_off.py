"""Tables read off the records of another table, or off what people and studies left."""

from __future__ import annotations

from eval.statistics import selection_noise, wilson
from experiments.records import unpack
from paper.manifest import Manifest
from paper.render.shown import better, chosen_text, nothing_beat_vanilla
from paper.render.values import Block, Row, Value
from paper.specs import Spec


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
                if chosen is None:
                    value = Value(why=nothing_beat_vanilla(found))
                else:
                    value = Value(f"{chosen:g}", best["site"], number=chosen)
                value.ids = [best["id"]]
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append(Row(row, spec.rows[row]["label"], spec.rows[row].get("ours", False), values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def counts(spec: Spec, manifest: Manifest, block: str) -> Block:
    rows = []
    for row, (key, source) in spec.show["counts"].items():
        values = []
        for column in spec.columns:
            found = manifest.records(spec.source, block, source, column)
            value = Value(f"{found[0][key]}", number=found[0][key]) if found else Value()
            value.ids = [record["id"] for record in found[:1]]
            value.why = "" if found else manifest.why_missing(spec.source, block, source, column)
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append(Row(row, spec.rows[row]["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def noise(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Points that the best of the grid gains by chance, of all sites that were searched."""
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
            by_chance = selection_noise(outcomes, vanilla)
            small = f"95 % quantile {100 * by_chance.quantile:+.1f}"
            facts = [f"best of {by_chance.kept} of {len(outcomes)} settings on {len(vanilla)} items"]
            ids = [record["id"] for record in found]
            values.append(Value(f"{100 * by_chance.mean:+.1f}", small, facts, number=100 * by_chance.mean, ids=ids))
        rows.append(Row(row, says["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def prediction(spec: Spec, manifest: Manifest, block: str) -> Block:
    """The predicted gain, the measured gain on the pairs, and the test accuracy beside the searched row."""
    rows = []
    for row, says in spec.rows.items():
        searched = spec.show["searched"][row]
        kinds: dict[str, list[Value]] = {}
        for column in spec.columns:
            found = manifest.records(spec.source, block, row, column)
            beside = manifest.records(spec.source, block, searched, column)
            why = manifest.why_missing(spec.source, block, row, column)
            made = _predicted(found[0]) if found else {kind: Value(why=why) for kind in PREDICTED}
            made[ACCURACY] = _tested(found, why)
            for kind, value in made.items():
                kinds.setdefault(f"{says['label']}: {kind}", []).append(value)
            why = manifest.why_missing(spec.source, block, searched, column)
            kinds.setdefault(f"{spec.show['labels'][searched]}: {ACCURACY}", []).append(_tested(beside, why))
        rows += [Row(f"{row}: {label}", label, True, values) for label, values in kinds.items()]
    return Block(block, list(spec.columns), list(spec.columns), rows)


ACCURACY = "accuracy on test, %"
PREDICTED = ("predicted gain, nats", "measured gain on the pairs, nats", "measured / predicted", "k and alpha used")


def _predicted(record: dict) -> dict[str, Value]:
    before, after = record["foretold"]["predicted"], record["foretold"]["measured"]
    ratio = Value(f"{after / before:.2f}", number=after / before) if before else Value(why="nothing was predicted")
    values = (
        Value(f"{before:+.3f}", number=before),
        Value(f"{after:+.3f}", number=after),
        ratio,
        Value(chosen_text(record)),
    )
    for value in values:
        value.ids = [record["id"]]
    return dict(zip(PREDICTED, values, strict=True))


def _tested(found: list[dict], why: str) -> Value:
    if not found:
        return Value(why=why)
    low, high = (100 * edge for edge in wilson(found[0]["right"], found[0]["n"]))
    share = 100 * found[0]["right"] / found[0]["n"]
    return Value(f"{share:.1f}", f"[{low:.1f}, {high:.1f}]", number=share, ids=[found[0]["id"]])


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
        rows.append(Row(row, says["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def overhead(spec: Spec, manifest: Manifest, block: str) -> Block:
    """The difference from the paper's is shown only where the same thing was measured: on the same task."""
    found = manifest.panel(spec.name, block)
    columns = {"prepare_s": "preparation, s", "inference_s": "inference, s", "s_per_sample": "s per sample",
               "std": "± over trials", "gb": "memory, GB"}  # fmt: skip
    of, same = spec.show.get("printed_of", {}).get(block, ""), spec.show.get("same", {}).get(block, ())
    rows = []
    for row, label in spec.show["labels"].items():
        measured = (found or {}).get("found", {}).get(row, {})
        printed = spec.printed.get(block, {}).get(row, {})
        values = []
        for column in columns:
            number = measured.get(column)
            value = Value(f"{number:.4g}", number=number) if number is not None else Value()
            value.ids = [found["id"]] if found else []
            value.why = "" if found else manifest.why_missing(spec.name, block, "panel", block)
            paper = printed.get(column)
            if column in same:
                value.printed = paper
            elif paper is not None:
                value.small = f"paper, {of}: {paper:g}"
            values.append(value)
        rows.append(Row(row, label, row == "causal", values))
    items = (found or {}).get("params", {}).get("items", "?")
    name = f"{block} (n = {items})" + (f"; the paper's numbers: {of}" if of and spec.printed else "")
    return Block(name, list(columns), list(columns.values()), rows)
