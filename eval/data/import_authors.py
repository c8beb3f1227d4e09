"""Import the authors' wording, data sets and AU ranks from your copy of their repository: python main.py import-authors.

Their code is read, never run. Data sets and ranks are on a drive of theirs: unpack both archives into the checkout
(datasets/, AU_ranks/), or name one with --archive, as a folder or a .zip.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from austeer import arguments
from austeer.errors import AUSteerError
from austeer.files import write_json, write_json_lines
from austeer.ranks import AUTHORS_FILES, SITES, AURanks
from eval.data.authors_wording import read_wording
from eval.data.read import DATASETS, SPLITS, find_file, find_folder, read_catalogue
from eval.data.rows import read_file
from eval.tasks.registry import PAPER_TASKS


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser("main.py import-authors", __doc__)
    parser.add_argument("checkout", help="your copy of the authors' repository")
    parser.add_argument("--archive", help="folder or .zip of their data sets or AU ranks, if not in the checkout")
    parser.add_argument("--out", required=True, help="folder for wording.json and the data sets (a later --data-dir)")
    parser.add_argument("--ranks-out", default="AU_ranks/authors", help="folder for the ranks (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    checkout, out = Path(args.checkout), Path(args.out)
    if out.resolve() == DATASETS.resolve():
        raise AUSteerError(
            "datasets/ holds this project's own wording: choose another --out, and give it as --data-dir"
        )
    wording = read_wording(checkout / "utils" / "load_dataset.py")
    write_json(out / "wording.json", wording)
    print(f"wording of {len(wording) - 1} tasks: {out / 'wording.json'}")
    with tempfile.TemporaryDirectory() as unpacked:
        places = [checkout]
        if args.archive:
            places += _archive(Path(args.archive), Path(unpacked))
        failures = _import_datasets(places, out) + _import_ranks(places, Path(args.ranks_out))
    for line in failures:
        print(f"FAILED: {line}")
    return 1 if failures else 0


def _archive(archive: Path, unpacked: Path) -> list[Path]:
    """Return where its data sets and ranks may be. A .zip is unpacked, but for members that would go elsewhere."""
    if archive.is_dir():
        return [archive]
    try:
        shutil.unpack_archive(archive, unpacked, "zip")
    # the last two: an encrypted archive, an unknown compression
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise AUSteerError(f"--archive {archive} is neither a folder nor a readable .zip ({error})") from None
    return [unpacked, *unpacked.iterdir()]


def _import_datasets(places: Sequence[Path], out: Path) -> list[str]:
    failures = []
    for name, entry in read_catalogue().items():
        folders = [find_folder(entry, name, inner) for place in places for inner in (place / "datasets", place)]
        folder = next((one for one in folders if one is not None), None)
        if folder is None:
            print(f"missing: {name}: no folder {' or '.join(entry['folders'])} in {' or '.join(map(str, places))}")
            continue
        for split in SPLITS:
            try:
                path, target = find_file(entry, split, folder), out / name / f"{split}.jsonl"
                there = find_file(entry, split, target.parent, must=False) if target.parent.is_dir() else None
                if there is not None and (there.name != target.name or there.samefile(path)):
                    raise AUSteerError(f"{there} would be read instead, or lost; move it away, or choose another --out")
                rows = read_file(PAPER_TASKS[name], split, path)
                write_json_lines(target, rows)
                print(f"{name} {split}: {len(rows):,} rows from {path} into {target}")
            except AUSteerError as error:
                failures.append(str(error))
    return failures


def _import_ranks(places: Sequence[Path], out: Path) -> list[str]:
    failures, sets = [], {}
    for place in places:
        for file in sorted(place.rglob(AUTHORS_FILES[0])):
            sets.setdefault(file.parent.name, file.parent)
    if not sets:
        print(f"missing: AU ranks: no folder with {', '.join(AUTHORS_FILES)} in {' or '.join(map(str, places))}")
    for name, folder in tqdm(sets.items(), desc="AU ranks", unit="set", disable=not sets):
        site = name.rsplit("_", 1)[-1]
        if site not in SITES:
            failures.append(f"{folder}: its name does not end in a site ({', '.join(SITES)}); rename it so")
            continue
        try:
            ranks = AURanks.load(folder, site)
            ranks.header["folder"] = name
            ranks.save(out / f"{name}.safetensors")
            tqdm.write(f"AU ranks {name}: {ranks.score.shape[0]} layers of {ranks.score.shape[1]} AUs, into {out}")
        except (AUSteerError, ValueError, TypeError) as error:  # lists of something other than numbers
            failures.append(f"{folder}: {error}")
    return failures
