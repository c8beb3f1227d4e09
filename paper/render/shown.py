"""Which records of an entry are shown, and what is said of the settings that were chosen."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.records import unpack
from paper.manifest import Manifest
from paper.specs import Spec


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


def chosen_text(record: dict) -> str:
    """k and alpha too where the method found them itself, and how many AUs where no k says it."""
    foretold = record.get("foretold", {})
    parts = [f"{key} {value:g}" for key, value in record["settings"].items()]
    parts += [f"{key} {foretold[key]:.3g}" for key in ("k", "alpha") if key in foretold]
    k = record["settings"].get("k", foretold.get("k"))
    touched = record.get("touched")
    if touched is not None and touched != k:
        parts.append(f"{touched} AUs")
    return ", ".join(parts)


def nothing_beat_vanilla(asked: Sequence[dict]) -> str:
    """Of all sites that were asked, not only of the one whose record is shown."""
    return f"{' and '.join(dict.fromkeys(record['site'] for record in asked))}: nothing beat vanilla"
