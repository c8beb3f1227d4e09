"""The paper's data sets: where each comes from (datasets/catalogue.json), and their rows.

Looked for under --data-dir, then under datasets/, then on the hub. Splits are "train" and "test", whatever their
home calls them: the test of BoolQ and WinoGrande is their dev, that of RealToxicityPrompts the challenging prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from austeer.errors import AUSteerError
from eval.data.fetching import hub_name, hub_rows
from eval.data.rows import read_file

DATASETS = Path(__file__).parents[2] / "datasets"
CATALOGUE = DATASETS / "catalogue.json"
SPLITS = ("train", "test")


def read_catalogue(path: str | Path = CATALOGUE) -> dict[str, dict]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AUSteerError(f"cannot read the catalogue {path}: {error}") from None


def read_rows(
    name: str, split: str, data_dir: str | Path | None = None, catalogue: dict[str, dict] | None = None
) -> list[dict]:
    """The rows of one split of a task, with the fields that eval/data/rows.py gives it."""
    catalogue = catalogue or read_catalogue()
    if name not in catalogue or split not in SPLITS:
        raise AUSteerError(
            f"no {split} split of {name!r}: tasks are {', '.join(catalogue)}, splits {', '.join(SPLITS)}"
        )
    if data_dir is not None and not Path(data_dir).is_dir():
        raise AUSteerError(f"no such folder of data sets: {data_dir}")
    places = [Path(place) for place in dict.fromkeys((data_dir, DATASETS)) if place is not None]
    for place in places:
        folder = find_folder(catalogue[name], name, place)
        if folder is not None:
            return read_file(name, split, find_file(catalogue[name], split, folder))
    looked = ", ".join(str(place / name) for place in places)
    source = catalogue[name]["splits"][split].get("hub")
    if source is None:
        raise AUSteerError(f"{name}: not in {looked}. {how_to_get(catalogue[name], name)}")
    try:
        return hub_rows(name, split, source)
    except AUSteerError as error:
        raise AUSteerError(f"{name}: not in {looked}, and {error}. {how_to_get(catalogue[name], name)}") from None


def find_folder(entry: dict, name: str, place: Path) -> Path | None:
    """The folder of a task under any of its accepted names, whatever their case."""
    if not place.is_dir():
        return None
    there = {path.name.casefold(): path for path in sorted(place.iterdir(), reverse=True) if path.is_dir()}
    return next((there[folder] for folder in (name, *entry["folders"]) if folder in there), None)


def find_file(entry: dict, split: str, folder: Path, must: bool = True) -> Path | None:
    """The file of one split. A folder without it is an error: train and test should not come from different places."""
    there = {path.name.casefold(): path for path in folder.iterdir() if path.is_file()}
    names = entry["splits"][split]["files"]
    for name in names:
        if name.casefold() in there:
            return there[name.casefold()]
    if not must:
        return None
    raise AUSteerError(f"{folder} has no file of the {split} split ({', '.join(names)}); complete it or move it away")


def how_to_get(entry: dict, name: str) -> str:
    return entry.get("by_hand") or f"`python main.py data --fetch {name}` fetches it"


def home(entry: dict, split: str) -> str:
    source = entry["splits"][split]
    return source.get("url") or (hub_name(source["hub"]) if source.get("hub") else entry["home"])
