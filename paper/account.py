"""What a run has so far, noted in the manifest as it goes: whoever kills it loses nothing, and `--plan` can tell."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from austeer import processes as shared_work
from experiments.setting import Cell
from paper.manifest import Manifest
from paper.specs import Panel, Spec

EVERY = 5.0  # seconds


class Account:
    def __init__(self, found: Sequence[Spec], manifest: Manifest):
        self.found, self.manifest = found, manifest
        self.records: dict[Cell, dict] = {}
        self.drawn: dict[Panel, dict] = {}
        self.failed: dict[str, str] = {}  # by "spec|block|row|column", why
        self._written = monotonic()

    def cell(self, cell: Cell, record: dict) -> None:
        self.records[cell] = record
        self._now_and_then()

    def panel(self, panel: Panel, record: dict) -> None:
        self.drawn[panel] = record
        self._now_and_then()

    def _now_and_then(self) -> None:
        if monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        for spec in self.found:
            for entry in spec.entries:
                if all(cell in self.records for cell in entry.cells):
                    made = [self.records[cell] for cell in entry.cells]
                    ids = self._made(f"{spec.name}|{entry.block}|{entry.row}|{entry.column}", made)
                    its = self.manifest.entries.setdefault(spec.name, {})
                    its[f"{entry.block}|{entry.row}|{entry.column}"] = ids
            for panel in spec.panels:
                if panel in self.drawn:
                    ids = self._made(f"{spec.name}|{panel.name}|panel|{panel.name}", [self.drawn[panel]])
                    its = self.manifest.panels.setdefault(spec.name, {})
                    its.pop(panel.name, None)  # an earlier picture is not this one
                    for id in ids:
                        its[panel.name] = id
        if shared_work.is_first():
            self.manifest.write()
        self._written = monotonic()

    def _made(self, key: str, records: Sequence[dict]) -> list[str]:
        """Their ids, or none where one failed; why is noted."""
        for noted in (self.failed, self.manifest.failed):
            noted.pop(key, None)
        why = next((record["failed"] for record in records if "failed" in record), None)
        if why is None:
            return [record["id"] for record in records]
        self.failed[key] = self.manifest.failed[key] = why
        return []
