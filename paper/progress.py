"""Note in the manifest what a run has finished, so that a kill loses nothing and `--estimate` can count it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from experiments.cell import Cell
from paper.manifest import Manifest
from paper.specs import Panel, Spec

EVERY = 5.0  # seconds


class Progress:
    """Collect records as they come; `publish` is called whenever one more block of a table, or one picture, is complete."""

    def __init__(self, specs: Sequence[Spec], manifest: Manifest, publish: Callable[[], None] = lambda: None):
        self.specs, self.manifest, self.publish = specs, manifest, publish
        self.records: dict[Cell, dict] = {}
        self.panels: dict[Panel, dict] = {}
        self.failed: dict[str, str] = {}  # "spec|block|row|column" -> why
        self._written, self._complete = monotonic(), 0

    def add(self, job: Cell | Panel, record: dict) -> None:
        (self.panels if isinstance(job, Panel) else self.records)[job] = record
        if monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        """Note what is finished, and publish if that completes a block."""
        complete = 0
        for spec in self.specs:
            finished: dict[str, list[bool]] = {}
            for entry in spec.entries:
                key = f"{entry.block}|{entry.row}|{entry.column}"
                is_finished = all(cell in self.records for cell in entry.cells)
                finished.setdefault(entry.block, []).append(is_finished)
                if is_finished:
                    ids = self._ids(f"{spec.name}|{key}", [self.records[cell] for cell in entry.cells])
                    self.manifest.entries.setdefault(spec.name, {})[key] = ids
            for panel in spec.panels:
                if panel in self.panels:
                    complete += 1
                    ids = self._ids(f"{spec.name}|{panel.name}|panel|{panel.name}", [self.panels[panel]])
                    by_panel = self.manifest.panels.setdefault(spec.name, {})
                    by_panel.pop(panel.name, None)  # an earlier picture must not stand for this one
                    by_panel.update((panel.name, id) for id in ids)
            complete += sum(map(all, finished.values()))
        bases = {record["id"] for cell, record in self.records.items() if not cell.steered and "id" in record}
        self.manifest.bases = sorted({*self.manifest.bases, *bases})
        self.manifest.write()
        if complete > self._complete:
            self._complete = complete
            self.publish()
        self._written = monotonic()

    def _ids(self, key: str, records: Sequence[dict]) -> list[str]:
        """Return the ids of the records, or none where one failed; note why."""
        for notes in (self.failed, self.manifest.failed):
            notes.pop(key, None)
        why = next((record["failed"] for record in records if "failed" in record), None)
        if why is None:
            return [record["id"] for record in records]
        self.failed[key] = self.manifest.failed[key] = why
        return []
