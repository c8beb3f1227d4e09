"""Fetch the paper's data sets from their homes, or check and count what is there: python main.py data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from austeer import arguments
from austeer.errors import AUSteerError
from austeer.files import read_json, write_json, write_json_lines
from eval.data import read
from eval.data.fetching import download, hub_rows, sha256
from eval.data.read import CATALOGUE, DATASETS, SPLITS, find_file, find_folder, read_catalogue
from eval.data.rows import read_file
from eval.tasks.registry import PAPER_TASKS

FETCHED = "fetched.json"  # beside the files of a task: what was fetched, from where, with which hash
COLUMNS = ("task", "split", "file", "rows", "official", "paper", "duplicates", "train texts in test", "sha256")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser(
        "main.py data",
        __doc__,
        epilog="A finished file is not fetched again: to go on after an interruption, run the same command. Files that "
        "you put there yourself are never overwritten. docs/data.md lists the layouts that are read, and the data sets "
        "that are given out on request only.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fetch", nargs="*", metavar="TASK", help="fetch these tasks (default: all)")
    check = "load, validate and count the files that are there (default: all; a task named here must be there)"
    what.add_argument("--check", nargs="*", metavar="TASK", help=check)
    parser.add_argument(
        "--data-dir", default=str(DATASETS), help="folder with one folder per task (default: datasets/)"
    )
    parser.add_argument("--catalogue", default=str(CATALOGUE), help="use another catalogue, such as a mirror's")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    catalogue, folder = read_catalogue(args.catalogue), Path(args.data_dir)
    if args.catalogue == str(CATALOGUE):
        sources = {name: task for name, task in PAPER_TASKS.items() if task.data_of is None}
        catalogue = {name: read.catalogue_entry(task, catalogue) for name, task in sources.items()}
    named = args.check if args.fetch is None else args.fetch
    if unknown := sorted(set(named) - set(catalogue)):
        raise AUSteerError(f"no task {', '.join(unknown)}; there are {', '.join(catalogue)}")
    chosen = {name: entry for name, entry in catalogue.items() if not named or name in named}
    if args.fetch is not None:
        return _fetch(chosen, folder)
    if not folder.is_dir():
        raise AUSteerError(f"no such folder: {folder}")
    return _check(chosen, folder, must_be_there=bool(named))


def _fetch(chosen: dict[str, dict], data_dir: Path) -> int:
    """Fetch one task after the other; a failure is reported, and the others go on."""
    failed = []
    for name, entry in chosen.items():
        print(f"{name}: {entry['title']}, licence: {entry['licence']}")
        if entry.get("by_hand"):
            print(f"  by hand: {entry['by_hand']}")
            continue
        for split in SPLITS:
            try:
                path, outcome = fetch_split(name, entry, split, find_folder(entry, name, data_dir) or data_dir / name)
                rows = read_file(PAPER_TASKS[name], split, path)
                print(f"  {split}: {len(rows):,} rows, {path.name}, {outcome}")
            except AUSteerError as error:
                failed.append(f"{name} {split}")
                print(f"  {split}: FAILED: {error}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}. Finished files are kept; run the same command to try again.")
    return 1 if failed else 0


def fetch_split(name: str, entry: dict, split: str, folder: Path) -> tuple[Path, str]:
    """Return the file of one split, fetched if there is none yet, and what was done, in words."""
    source, where = entry["splits"][split], read.home(entry, split)
    hashes, fetched = source.get("sha256", {}), _fetched(folder)
    path = find_file(entry, split, folder, must=False) if folder.is_dir() else None
    if path is not None:
        known = hashes.get(path.name) or fetched.get(path.name, {}).get("sha256")
        if known is None:
            return path, "your own file: kept as it is"
        digest = sha256(path)
        if digest.startswith(known) or fetched.get(path.name, {}).get("sha256") == digest:
            return path, "already there"
        raise AUSteerError(f"{path} has SHA-256 {digest[:12]}..., not {known[:12]}... as fetched; move it away first")
    url = source.get("url")
    # files of a URL keep their name, and so their official hash; rows of the hub become JSON Lines
    path = folder / (url.rsplit("/", 1)[-1] if url else f"{split}.jsonl")
    if url:
        download(url, path, hashes.get(path.name))
    else:
        write_json_lines(path, hub_rows(PAPER_TASKS[name], split, source["hub"]))
    fetched[path.name] = {"from": where, "sha256": sha256(path)}
    write_json(folder / FETCHED, fetched)
    return path, f"from {where}"


def _fetched(folder: Path) -> dict[str, dict]:
    return read_json(folder / FETCHED) if (folder / FETCHED).exists() else {}


def _check(chosen: dict[str, dict], data_dir: Path, must_be_there: bool) -> int:
    table, faults, missing = [], [], []
    for name, entry in chosen.items():
        folder = find_folder(entry, name, data_dir)
        if folder is None:
            missing.append(f"{name}: not in {data_dir}. {read.how_to_get(entry, name)}")
            continue
        questions: dict[str, set] = {}
        for split in SPLITS:
            try:
                path = find_file(entry, split, folder)
                rows = read_file(PAPER_TASKS[name], split, path)
            except AUSteerError as error:
                faults.append(str(error))
                continue
            questions[split] = {tuple(row[key] for key in PAPER_TASKS[name].keys) for row in rows}
            source, digest = entry["splits"][split], sha256(path)
            known = (source.get("sha256") or {}).get(path.name)
            official = " official" if known and digest.startswith(known) else ""
            fetched = _fetched(folder).get(path.name, {}).get("sha256")
            if fetched not in (None, digest):
                faults.append(f"{path} has changed since it was fetched (SHA-256 {digest[:12]}, was {fetched[:12]})")
            overlap = len(questions["train"] & questions["test"]) if questions.keys() == set(SPLITS) else "-"
            counts = (len(rows), source["rows"] or "-", source["paper"] or "-", len(rows) - len(questions[split]))
            in_test = overlap if split == "test" else ""
            table.append((name, split, path.name, *counts, in_test, digest[:12] + official))
    _print_table(table)
    for kind, lines in (("missing", missing), ("FAULT", faults)):
        for line in lines:
            print(f"{kind}: {line}")
    if not table and not faults:
        print(f"nothing to check in {data_dir}: `python main.py data --fetch` fetches all that can be fetched")
    return 1 if faults or not table or (must_be_there and missing) else 0


def _print_table(rows: list[tuple]) -> None:
    if not rows:
        return
    lines = [COLUMNS, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()
