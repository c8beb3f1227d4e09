"""The manifest: which records a scale's tables are made of. A run writes it; the report and `trace` read it.

The report is built from one folder, which holds manifest.json, the records it names, and the results of judges and raters.
No model is loaded, so a committed folder gives the same report on any machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.files import read_json_lines, write_json, write_json_lines

NAME = "manifest.json"


@dataclass
class Manifest:
    folder: Path
    scale: str
    how: dict = field(default_factory=dict)  # options that all cells share: limit, batch_size, engine, toxicity, attn
    dry_run: bool = False  # whether tiny random checkpoints stand for the models
    everything: bool = False  # whether a run had --all
    entries: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # spec -> "block|row|column" -> record ids
    panels: dict[str, dict[str, str]] = field(default_factory=dict)  # spec -> panel -> record id
    bases: list[str] = field(default_factory=list)  # ids of unsteered records that steered ones are compared with
    orphans: int = 0  # records of the folder that no table names, at the end of the last run
    failed: dict[str, str] = field(default_factory=dict)  # "spec|block|row|column" -> why

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / NAME
        if not path.exists():
            raise AUSteerError(f"nothing was run in {folder} ({path} is missing): run bash reproduce.sh first")
        return cls(folder, **json.loads(path.read_text()))

    @classmethod
    def resume(cls, folder: Path, scale: str, how: dict, dry_run: bool) -> Manifest:
        """Return the manifest of earlier runs if they had the same options, else a new one."""
        fresh = cls(folder, scale, how, dry_run)
        if not (folder / NAME).exists():
            return fresh
        before = cls.read(folder)
        return before if (before.how, before.dry_run) == (how, dry_run) else fresh

    def write(self) -> None:
        content = {
            key: getattr(self, key)
            for key in ("scale", "how", "dry_run", "everything", "entries", "panels", "bases", "orphans", "failed")
        }
        write_json(self.folder / NAME, content)

    def records(self, spec: str, block: str, row: str, column: str) -> list[dict]:
        ids = self.entries.get(spec, {}).get(f"{block}|{row}|{column}", [])
        return [record for id in ids if (record := self.record(id)) is not None]

    def panel(self, spec: str, panel: str) -> dict | None:
        return self.record(self.panels.get(spec, {}).get(panel, ""))

    @staticmethod
    def load(path: Path) -> dict:
        return json.loads(path.read_text())

    def count_orphans(self) -> None:
        """Count the records in the folder that no table names: other code or other options made them."""
        self.orphans = len({path.stem for path in (self.folder / "records").glob("*.json")} - {*self.ids, *self.bases})
        self.write()

    def why_missing(self, spec: str, block: str, row: str, column: str) -> str:
        return self.failed.get(f"{spec}|{block}|{row}|{column}", "not run")

    def record(self, id: str) -> dict | None:
        if id in self._bundle:
            return self._bundle[id]
        path = self.folder / "records" / f"{id}.json"
        return json.loads(path.read_text()) if id and path.exists() else None

    @cached_property
    def _bundle(self) -> dict[str, dict]:
        """Return all records of records.jsonl, the one file in which they are committed."""
        path = self.folder / "records.jsonl"
        return {record["id"]: record for _, record in read_json_lines(path)} if path.exists() else {}

    @property
    def ids(self) -> list[str]:
        entry_ids = (id for spec in self.entries.values() for ids in spec.values() for id in ids)
        panel_ids = (id for spec in self.panels.values() for id in spec.values())
        return sorted({*entry_ids, *panel_ids})


def bundle(manifest: Manifest, out: Path) -> None:
    """Write the manifest and its records into a folder that can be committed."""
    write_json_lines(out / "records.jsonl", [manifest.record(id) for id in manifest.ids])
    replace(manifest, folder=out).write()
