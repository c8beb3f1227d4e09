"""Draw the pictures of a spec from records, and say what could not be drawn and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from austeer.errors import one_line
from paper.manifest import Manifest
from paper.render import curves, equal_kl, heat_maps
from paper.specs import Panel, Spec
from paper.studies import STUDIES

DRAWN_FROM_CELLS = {"lines": curves, "heatmap": heat_maps, "equal-kl": equal_kl}


@dataclass(frozen=True)
class Picture:
    caption: str
    path: Path | None  # None if it could not be drawn
    note: str = ""  # how to read this picture, and what its record adds; or why it could not be drawn
    ids: list[str] = field(default_factory=list)  # ids of the records that it is drawn from


def draw(spec: Spec, manifest: Manifest, folder: Path) -> list[Picture]:
    """Draw every picture that the records allow."""
    if spec.kind == "study":
        return [
            _study(spec, panel, record, folder)
            for panel in spec.panels
            if (record := manifest.panel(spec.name, panel.name)) is not None
        ]
    if spec.kind in DRAWN_FROM_CELLS:
        path = folder / f"{spec.name}.png"
        note = DRAWN_FROM_CELLS[spec.kind].draw(spec, manifest, path)
        ids = [id for entry in manifest.entries.get(spec.name, {}).values() for id in entry]
        return [] if note is None else [Picture(f"{spec.label}: {spec.title}", path, note, ids)]
    return []


def _study(spec: Spec, panel: Panel, record: dict, folder: Path) -> Picture:
    path = folder / f"{spec.name}-{'-'.join(re.findall('[a-z0-9]+', panel.name.lower()))}.png"
    caption, study = f"{spec.label}: {spec.title} ({panel.name})", STUDIES[panel.study]
    try:
        study.draw(record["found"], panel.params, path, panel.printed)
        note = study.note(record["found"], panel.params) if hasattr(study, "note") else ""
    except Exception as error:  # one picture that fails must not take the report of days with it
        return Picture(caption, None, f"measured, but could not be drawn: {one_line(error)}")
    return Picture(caption, path, note, [record["id"]])


def missing_pictures(spec: Spec, manifest: Manifest) -> list[tuple[str, str]]:
    """Return (what, why) for everything that a picture should show and does not."""
    if spec.kind == "study":
        return [
            (panel.name, manifest.why_missing(spec.name, panel.name, "panel", panel.name))
            for panel in spec.panels
            if manifest.panel(spec.name, panel.name) is None
        ]
    if spec.kind not in DRAWN_FROM_CELLS:
        return []
    missing = []
    for entry in spec.entries:
        place = (entry.block, entry.row, entry.column)
        suffix = f" ({entry.block})" if len(spec.blocks) > 1 else ""
        what = f"{spec.rows[entry.row]['label']} / {entry.column}{suffix}"
        if not manifest.records(spec.name, *place):
            missing.append((what, manifest.why_missing(spec.name, *place)))
        elif spec.columns[entry.column].get("judge"):
            missing.append((what, heat_maps.NEEDS_A_JUDGE))
    return missing
