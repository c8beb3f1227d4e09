"""A section of the report per table or figure: its numbers, its pictures, and what is missing and why.

The page is rewritten after every finished block of a run, so a section is made anew only when what it is made of changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paper.manifest import Manifest
from paper.render.pictures import Picture, draw, undrawn
from paper.render.tables import blocks
from paper.render.values import Block
from paper.render.versions import mixed
from paper.specs import Spec

TABLES = ("accuracy", "settings", "counts", "noise", "prediction", "human", "overhead")


@dataclass
class Section:
    spec: Spec
    blocks: list[Block] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def drawn(self) -> list[Picture]:
        return [picture for picture in self.pictures if picture.path is not None]


_MADE: dict[tuple[Path, str], tuple[object, Section]] = {}  # by folder and spec: what it was made of, and the section


def section(spec: Spec, manifest: Manifest) -> Section:
    key, made_of = (manifest.folder, spec.name), _made_of(spec, manifest)
    if key not in _MADE or _MADE[key][0] != made_of or any(not one.path.exists() for one in _MADE[key][1].drawn):
        _MADE[key] = (made_of, _make(spec, manifest))
    return _MADE[key][1]


def _made_of(spec: Spec, manifest: Manifest) -> object:
    """Collect all that decides what a section shows: a record's id names its content."""
    entries = {name: dict(manifest.entries.get(name, {})) for name in (spec.name, spec.source)}
    failed = {place: why for place, why in manifest.failed.items() if place.split("|")[0] in entries}
    people = {path.name: path.stat().st_mtime_ns for path in manifest.folder.glob("[jh]u*-*.json")}  # judge-, human-
    return spec, entries, dict(manifest.panels.get(spec.name, {})), failed, people


def _make(spec: Spec, manifest: Manifest) -> Section:
    made = Section(
        spec, blocks(spec, manifest) if spec.kind in TABLES else [], draw(spec, manifest, manifest.folder / "figures")
    )
    for block in made.blocks:
        ids = dict.fromkeys(id for row in block.rows for value in row.values for id in value.ids)
        block.notes += filter(None, [mixed(map(manifest.record, ids), "table")])
    ids = dict.fromkeys(id for picture in made.drawn for id in picture.ids)
    made.notes += filter(None, [mixed(filter(None, map(manifest.record, ids)), "figure")])
    made.missing = _missing(made, manifest)
    return made


def _missing(made: Section, manifest: Manifest) -> list[str]:
    """Name the reason of every dash and of every picture that is not there, alike ones together."""
    whys: dict[str, list[str]] = {}
    for block in made.blocks:
        for row in block.rows:
            for column, value in zip(block.columns, row.values, strict=True):
                if value.why:
                    whys.setdefault(value.why, []).append(f"{row.label} / {column}")
    failed = [(picture.caption, picture.note) for picture in made.pictures if picture.path is None]
    for what, why in (*undrawn(made.spec, manifest), *failed):
        whys.setdefault(why, []).append(what)
    return [f"{_briefly(where)}: {why}" for why, where in whys.items() if not why.startswith("a part is missing")]


def _briefly(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
