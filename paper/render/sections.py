"""Make a section of the report per table or figure: its numbers, its pictures, and what is missing and why.

The page is rewritten after every finished block of a run, so a section is made anew only when its sources changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paper.manifest import Manifest
from paper.render.pictures import Picture, draw, missing_pictures
from paper.render.tables import blocks
from paper.render.values import Block
from paper.render.versions import mixed
from paper.specs import Spec

TABLES = ("accuracy", "equal-kl", "settings", "counts", "noise", "parts", "prediction", "human", "overhead")


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


# (folder, spec) -> what the section was made from, and the section
_CACHE: dict[tuple[Path, str], tuple[object, Section]] = {}


def section(spec: Spec, manifest: Manifest) -> Section:
    key, sources = (manifest.folder, spec.name), _sources(spec, manifest)
    if key not in _CACHE or _CACHE[key][0] != sources or any(not one.path.exists() for one in _CACHE[key][1].drawn):
        _CACHE[key] = (sources, _make(spec, manifest))
    return _CACHE[key][1]


def _sources(spec: Spec, manifest: Manifest) -> object:
    """Return all that decides what a section shows; a record's id stands for its content."""
    entries = {name: dict(manifest.entries.get(name, {})) for name in (spec.name, spec.source)}
    failed = {place: why for place, why in manifest.failed.items() if place.split("|")[0] in entries}
    people = {path.name: path.stat().st_mtime_ns for path in manifest.folder.glob("[jh]u*-*.json")}  # judge-, human-
    return spec, entries, dict(manifest.panels.get(spec.name, {})), failed, people


def _make(spec: Spec, manifest: Manifest) -> Section:
    new = Section(
        spec, blocks(spec, manifest) if spec.kind in TABLES else [], draw(spec, manifest, manifest.folder / "figures")
    )
    for block in new.blocks:
        ids = dict.fromkeys(id for row in block.rows for value in row.values for id in value.ids)
        block.notes += filter(None, [mixed(map(manifest.record, ids), "table")])
    ids = dict.fromkeys(id for picture in new.drawn for id in picture.ids)
    new.notes += filter(None, [mixed(filter(None, map(manifest.record, ids)), "figure")])
    new.missing = _missing(new, manifest)
    return new


def _missing(section: Section, manifest: Manifest) -> list[str]:
    """Give the reason for every dash and every missing picture, one line per reason."""
    whys: dict[str, list[str]] = {}
    for block in section.blocks:
        for row in block.rows:
            for column, value in zip(block.columns, row.values, strict=True):
                if value.why:
                    whys.setdefault(value.why, []).append(f"{row.label} / {column}")
    failed = [(picture.caption, picture.note) for picture in section.pictures if picture.path is None]
    for what, why in (*missing_pictures(section.spec, manifest), *failed):
        whys.setdefault(why, []).append(what)
    return [f"{_briefly(where)}: {why}" for why, where in whys.items() if not why.startswith("a part is missing")]


def _briefly(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
