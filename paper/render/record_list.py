"""The list of records at the end of the page, to which every number links."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from paper.manifest import Manifest
from paper.render.selection import chosen_text
from paper.specs import Spec


@dataclass(frozen=True)
class ListedRecord:
    id: str
    facts: str
    file: str  # relative to the page
    trace: str  # the command that prints it, in the first table that shows it


def record_list(specs: Sequence[Spec], manifest: Manifest) -> list[ListedRecord]:
    traces = _traces(specs, manifest)
    records = ((id, manifest.record(id)) for id in manifest.ids)
    return [
        ListedRecord(id, _facts(record), _file(id, manifest), traces.get(id, ""))
        for id, record in records
        if record is not None
    ]


def _file(id: str, manifest: Manifest) -> str:
    alone = f"records/{id}.json"
    return alone if (manifest.folder / alone).exists() else "records.jsonl"


def _facts(record: dict) -> str:
    """Describe a record in a line: what was computed, the result, and where it was made."""
    parts = [record.get("method"), record.get("site"), record.get("task"), record.get("model")]
    if record.get("settings"):
        parts.append(chosen_text(record))
    if record.get("draw"):
        parts.append(f"draw {record['draw']}")
    if "right" in record:
        parts.append(f"{record['right']} of {record['n']} right")
    commit = record["environment"]["commit"]
    return ", ".join([*filter(None, parts), record["device"], f"commit {commit[:10]}"])


def _traces(specs: Sequence[Spec], manifest: Manifest) -> dict[str, str]:
    traces: dict[str, str] = {}
    for spec in specs:
        for place, ids in manifest.entries.get(spec.name, {}).items():
            block, row, column = place.split("|")
            names = [row, column, *(["--block", block] if len(spec.blocks) > 1 else [])]
            for id in ids:
                traces.setdefault(id, _trace(spec, names))
        for panel, id in manifest.panels.get(spec.name, {}).items():
            traces.setdefault(id, _trace(spec, [panel]))
    return traces


def _trace(spec: Spec, names: Sequence[str]) -> str:
    scale = [] if spec.scale == "embedded" else ["--scale", spec.scale]  # trace's own default
    return shlex.join(["python", "main.py", "trace", spec.name, *names, *scale])
