"""Tables made from the records of another table, from people's ratings, or from a study."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

from eval.statistics import selection_noise, wilson
from experiments.records import unpack
from paper.comparable import ON_ANOTHER_MACHINE, RATED_BY_OTHERS
from paper.manifest import Manifest
from paper.render.conditions import unlike
from paper.render.selection import better_site, chosen_text, nothing_beat_vanilla
from paper.render.values import Block, Row, Value
from paper.specs import Spec


def settings(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Show the k or alpha that was chosen, at the site that was better on validation."""
    rows = []
    for row, sources in spec.show["rows"].items():
        values = []
        for column in spec.columns:
            records = [record for name in sources for record in manifest.records(spec.source, block, name, column)]
            value = Value(why="" if records else manifest.why_missing(spec.source, block, sources[0], column))
            if records:
                best = better_site(records)
                chosen = (best["settings"] or {}).get(spec.show["key"])
                if chosen is None:
                    value = Value(why=nothing_beat_vanilla(records))
                else:
                    value = Value(f"{chosen:g}", best["site"], number=chosen)
                value.ids = [best["id"]]
                value.unlike = unlike([best]) if spec.printed else []
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append(Row(row, spec.rows[row]["label"], spec.rows[row].get("ours", False), values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def counts(spec: Spec, manifest: Manifest, block: str) -> Block:
    rows = []
    for row, (key, source) in spec.show["counts"].items():
        values = []
        for column in spec.columns:
            records = manifest.records(spec.source, block, source, column)
            value = Value(f"{records[0][key]}", number=records[0][key]) if records else Value()
            value.ids = [record["id"] for record in records[:1]]
            value.why = "" if records else manifest.why_missing(spec.source, block, source, column)
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append(Row(row, spec.rows[row]["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def noise(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Show how many points the best grid point gains by chance, over all sites that were searched."""
    rows = []
    for row, row_fields in spec.rows.items():
        values = []
        for column in spec.columns:
            records = [
                record for record in manifest.records(spec.source, block, row, column) if record.get("grid_outcomes")
            ]
            if not records:
                values.append(Value(why=manifest.why_missing(spec.source, block, row, column)))
                continue
            # the number shown in the source is the best over the grid points of all sites
            outcomes = {
                f"{record['site']} {key}": unpack(packed)
                for record in records
                for key, packed in record["grid_outcomes"].items()
            }
            vanilla = unpack(records[0]["grid_vanilla"])
            by_chance = selection_noise(outcomes, vanilla)
            small = f"95 % quantile {100 * by_chance.quantile:+.1f}"
            facts = [f"best of {by_chance.kept} of {len(outcomes)} grid points on {len(vanilla)} items"]
            ids = [record["id"] for record in records]
            values.append(Value(f"{100 * by_chance.mean:+.1f}", small, facts, number=100 * by_chance.mean, ids=ids))
        rows.append(Row(row, row_fields["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def prediction(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Show the predicted gain, the measured gain on the pairs, and the test accuracy, with that of the searched row."""
    rows = []
    for row, row_fields in spec.rows.items():
        searched = spec.show["searched"][row]
        kinds: dict[str, list[Value]] = {}
        for column in spec.columns:
            records = manifest.records(spec.source, block, row, column)
            searched_records = manifest.records(spec.source, block, searched, column)
            why = manifest.why_missing(spec.source, block, row, column)
            by_kind = _predicted(records[0]) if records else {kind: Value(why=why) for kind in PREDICTED}
            by_kind[ACCURACY] = _accuracy(records, why)
            for kind, value in by_kind.items():
                kinds.setdefault(f"{row_fields['label']}: {kind}", []).append(value)
            why = manifest.why_missing(spec.source, block, searched, column)
            kinds.setdefault(f"{spec.show['labels'][searched]}: {ACCURACY}", []).append(
                _accuracy(searched_records, why)
            )
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


def _accuracy(records: list[dict], why: str) -> Value:
    if not records:
        return Value(why=why)
    low, high = (100 * edge for edge in wilson(records[0]["right"], records[0]["n"]))
    share = 100 * records[0]["right"] / records[0]["n"]
    return Value(f"{share:.1f}", f"[{low:.1f}, {high:.1f}]", number=share, ids=[records[0]["id"]])


def human(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Show the ratings that `main.py human score --out FOLDER/human-BLOCK.json` wrote."""
    path = manifest.folder / f"human-{block}.json"
    ratings = manifest.load(path)["rows"] if path.exists() else []
    ratings = [row for row in ratings if row["task"] == "all tasks"] or ratings
    rows = []
    for row, row_fields in spec.rows.items():
        values = []
        for column in spec.columns:
            rating = next((one[column] for one in ratings if one["system"].casefold() == row), None)
            value = Value(
                why=f"needs raters: main.py human export, then main.py human score --out {path.name} in this folder"
            )
            if rating is not None:
                value = Value(
                    f"{rating['mean']:.1f}",
                    f"[{rating['low']:.1f}, {rating['high']:.1f}]",
                    number=rating["mean"],
                    unlike=[RATED_BY_OTHERS],
                )
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            values.append(value)
        rows.append(Row(row, row_fields["label"], False, values))
    return Block(block, list(spec.columns), list(spec.columns), rows)


def overhead(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Show memory and times of methods over all tasks of a model: the largest memory, the sum of times."""
    panels = [panel for panel in spec.panels if panel.block == block]
    records = {panel.task.name: manifest.panel(spec.name, panel.name) for panel in panels}
    missing = next((panel.name for panel in panels if records[panel.task.name] is None), None)
    why = f"{missing}: {manifest.why_missing(spec.name, missing, 'panel', missing)}" if missing else ""
    measured = {task: record["found"] for task, record in records.items() if record is not None}
    columns = {"prepare_gb": "preparation, GB", "prepare_s": "preparation, s", "gb": "inference, GB",
               "inference_s": "inference, s", "s_per_sample": "s per sample", "std": "± over trials"}  # fmt: skip
    rows = []
    for row, label in spec.show["labels"].items():
        totals = {} if missing else _overhead(measured, row)
        values = []
        for column in columns:
            number, by_task = totals.get(column, (None, {}))
            value = Value(f"{number:.4g}", number=number) if number is not None else Value(why=why)
            if number is None and not missing and column in ("prepare_gb", "gb"):
                value.why = "torch counts the memory of GPUs only"
            if row == "vanilla" and column.startswith("prepare"):
                value = Value("")  # it learns nothing from the pairs
            value.facts = [f"{task} {part:.4g}" for task, part in by_task.items() if part is not None]
            value.ids = [record["id"] for record in records.values() if record is not None]
            value.printed = spec.printed.get(block, {}).get(row, {}).get(column)
            value.unlike = [ON_ANOTHER_MACHINE]
            values.append(value)
        rows.append(Row(row, label, row == "causal", values))
    sizes = [
        f"{task} {one['pairs']} pairs, {one['items']} of {one['test']} test items" for task, one in measured.items()
    ]
    notes = [f"Measured on: {'; '.join(sizes)}. Memory is that of the task that needs most."] if sizes else []
    return Block(block, list(columns), list(columns.values()), rows, notes)


def _overhead(measured: dict[str, dict], row: str) -> dict[str, tuple[float | None, dict[str, float | None]]]:
    """Return each column's total over all tasks, and the number of each task. Times are scaled up to all test items of a task."""
    of_row = {task: one["methods"][row] for task, one in measured.items()}
    sizes = {task: one["test"] for task, one in measured.items()}
    prepare, prepare_gb, gb = ({t: of[key] for t, of in of_row.items()} for key in ("prepare_s", "prepare_gb", "gb"))
    latency = {task: mean(of["s_per_sample"]) for task, of in of_row.items()}
    inference = {task: sizes[task] * seconds for task, seconds in latency.items()}
    n = sum(sizes.values())
    trials = zip(*([sizes[task] * s for s in of["s_per_sample"]] for task, of in of_row.items()), strict=True)
    by_trial = [sum(trial) / n for trial in trials]
    spread = stdev(by_trial) if len(by_trial) > 1 else 0.0
    return {
        "prepare_gb": (_of_all(max, prepare_gb), prepare_gb),
        "prepare_s": (_of_all(sum, prepare), prepare),
        "gb": (_of_all(max, gb), gb),
        "inference_s": (sum(inference.values()), inference),
        "s_per_sample": (mean(by_trial), latency),
        "std": (spread, {}),
    }


def _of_all(combine: Callable, parts: dict[str, float | None]) -> float | None:
    return None if None in parts.values() else combine(parts.values())
