"""Select the records of an entry that are shown, and describe the grid point that was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.records import unpack
from paper.manifest import Manifest
from paper.specs import Spec


def selected_records(spec: Spec, manifest: Manifest, block: str, row: str, column: str) -> list[dict]:
    """Return the draws of an entry, or its one record: of two sites, the one that was better on validation."""
    records = manifest.records(spec.name, block, row, column)
    drawn = spec.rows[row].get("draws", 1) > 1 or len({record.get("pairs_hash") for record in records}) > 1
    return records if drawn or len(records) < 2 else [better_site(records)]


def better_site(records: Sequence[dict]) -> dict:
    """Return the record of the site that was better on the items that all were evaluated on; among equals, the first."""
    outcomes_by_site = [
        unpack(record["grid_outcomes"][record["chosen"]]) if record["chosen"] else [] for record in records
    ]
    shared = min((len(outcomes) for outcomes in outcomes_by_site if outcomes), default=0)
    # where nothing beat vanilla, nothing was chosen
    scores = [sum(outcomes[:shared]) if outcomes else -1 for outcomes in outcomes_by_site]
    return records[max(range(len(records)), key=lambda i: (scores[i], -i))]


def chosen_text(record: dict) -> str:
    """Describe what was chosen, with the k and alpha that a method found itself.

    AUs are counted where k does not tell their number, and where gamma below -1 turns their sign over.
    """
    predicted = record.get("foretold", {})
    parts = [f"{key} {value:g}" for key, value in record["settings"].items()]
    parts += [f"{key} {predicted[key]:.3g}" for key in ("k", "alpha") if key in predicted]
    k = record["settings"].get("k", predicted.get("k"))
    n_steered = record.get("touched")
    if n_steered is not None and n_steered != k:
        parts.append(f"{n_steered} AUs")
    if record.get("inverted"):
        parts.append(f"{record['inverted']} of {n_steered} turned over")
    return ", ".join(parts)


def nothing_beat_vanilla(records: Sequence[dict]) -> str:
    """Name all sites that were tried, not only the one whose record is shown."""
    return f"{' and '.join(dict.fromkeys(record['site'] for record in records))}: nothing beat vanilla"
