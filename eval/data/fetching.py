"""Fetch files: from URLs, checked against a hash, and from the hub through the `datasets` library."""

from __future__ import annotations

import hashlib
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from austeer.errors import AUSteerError, one_line
from austeer.files import write_whole
from eval.data.rows import RowSource, normalise

TIMEOUT = 60


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str, path: Path, expected: str | None = None) -> None:
    """Fetch a file. expected: the SHA-256, or its beginning; a file with another is not kept."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"User-Agent": "AUSteer"}), timeout=TIMEOUT
        ) as answer:
            content = answer.read()  # these files have a few megabytes; a connection that breaks off raises
    except (OSError, HTTPException) as error:
        raise AUSteerError(f"cannot fetch {url} into {path}: {error}; run the same command to try again") from None
    digest = hashlib.sha256(content).hexdigest()
    if expected and not digest.startswith(expected):
        raise AUSteerError(f"{url} has SHA-256 {digest[:12]}..., not {expected[:12]}...: it was not kept; try later")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def hub_name(source: dict) -> str:
    config = f", {source['config']}" if source.get("config") else ""
    return f"{source['id']}{config} at {source['revision'][:12] if source.get('revision') else 'main (not pinned)'}"


def hub_rows(source: type[RowSource], split: str, hub: dict) -> list[dict]:
    """Return the rows of one split from the hub, at its pinned revision."""
    rows = hub_table(hub).to_list()
    bar = tqdm(rows, desc=f"{source.name} {split}", unit="row")
    return normalise(source, split, ((f"{hub['id']}, row {at}", row) for at, row in enumerate(bar, 1)))


def hub_table(hub: dict):
    import datasets  # slow to import, and only the hub needs it

    try:
        return datasets.load_dataset(hub["id"], hub.get("config"), split=hub["split"], revision=hub.get("revision"))
    except Exception as error:  # no network, no such split, gated, ...: the library has a type for each
        raise AUSteerError(f"the hub gave no {hub_name(hub)} ({one_line(error)[:160]})") from None
