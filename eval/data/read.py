"""Find the rows of a data set: where each comes from is in datasets/catalogue.json.

They are looked for under --data-dir, then under datasets/, then on the hub. Splits are "train" and "test", whatever their
home calls them: the test of BoolQ and WinoGrande is their dev, that of RealToxicityPrompts the challenging prompts.
"""

from __future__ import annotations

from pathlib import Path

from austeer.errors import AUSteerError
from austeer.files import read_json
from eval.data.fetching import hub_name, hub_rows
from eval.data.rows import RowSource, read_file

DATASETS = Path(__file__).parents[2] / "datasets"
CATALOGUE = DATASETS / "catalogue.json"
SPLITS = ("train", "test")


def read_catalogue(path: str | Path = CATALOGUE) -> dict[str, dict]:
    return read_json(Path(path))


def catalogue_entry(source: type[RowSource], catalogue: dict[str, dict] | None = None) -> dict:
    """Return the catalogue's entry of a data set, else the entry in its class, else one for plain files."""
    name = source.data_of or source.name
    plain = {
        "title": name,
        "licence": "not stated",
        "folders": [],
        "by_hand": f"Put train.jsonl and test.jsonl into the folder {name} of the data folder.",
        "splits": {split: {"files": [f"{split}.jsonl"], "rows": None, "paper": None} for split in SPLITS},
    }
    return (catalogue or read_catalogue()).get(name) or source.catalogue or plain


def read_rows(
    source: type[RowSource], split: str, data_dir: str | Path | None = None, catalogue: dict[str, dict] | None = None
) -> list[dict]:
    """Return the rows of one split, with the fields that the source's `read_row` gives them."""
    name, entry = source.data_of or source.name, catalogue_entry(source, catalogue)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise AUSteerError(f"no such folder of data sets: {data_dir}")
    places = [Path(place) for place in dict.fromkeys((data_dir, DATASETS)) if place is not None]
    for place in places:
        folder = find_folder(entry, name, place)
        if folder is not None:
            return read_file(source, split, find_file(entry, split, folder))
    missing = f"{name}: not in {', '.join(str(place / name) for place in places)}"
    hub = entry["splits"][split].get("hub")
    if hub is None:
        raise AUSteerError(f"{missing}. {how_to_get(entry, name)}")
    try:
        return hub_rows(source, split, hub)
    except AUSteerError as error:
        raise AUSteerError(f"{missing}, and {error}. {how_to_get(entry, name)}") from None


def find_folder(entry: dict, name: str, place: Path) -> Path | None:
    """Return the folder of a data set under any of its accepted names, whatever their case."""
    if not place.is_dir():
        return None
    there = {path.name.casefold(): path for path in sorted(place.iterdir(), reverse=True) if path.is_dir()}
    return next((there[folder] for folder in (name, *entry["folders"]) if folder in there), None)


def find_file(entry: dict, split: str, folder: Path, must: bool = True) -> Path | None:
    """Return the file of one split. A folder without it is an error: both splits should come from one place."""
    there = {path.name.casefold(): path for path in folder.iterdir() if path.is_file()}
    names = entry["splits"][split]["files"]
    path = next((there[name.casefold()] for name in names if name.casefold() in there), None)
    if path is None and must:
        raise AUSteerError(
            f"{folder} has no file of the {split} split ({', '.join(names)}); complete it or move it away"
        )
    return path


def how_to_get(entry: dict, name: str) -> str:
    return entry.get("by_hand") or f"`python main.py data --fetch {name}` fetches it"


def home(entry: dict, split: str) -> str:
    source = entry["splits"][split]
    return source.get("url") or (hub_name(source["hub"]) if source.get("hub") else entry["home"])
