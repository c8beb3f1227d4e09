"""Getting files: URLs with resumption and hashes, the hub through the `datasets` library."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from austeer.errors import AUSteerError
from eval.data.rows import normalise

ATTEMPTS = 3  # each goes on where the last one broke off
CHUNK = 1 << 16
TIMEOUT = 60


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path, expected: str | None = None) -> None:
    """Fetch into `path`; what was broken off waits in `path`.part and is continued. `expected`: (start of) the SHA-256."""
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if not any(_continue(url, part) for _ in range(ATTEMPTS)):
            raise AUSteerError(
                f"{url} broke off {ATTEMPTS} times, at byte {_size(part)}; run the same command to go on"
            )
    except OSError as error:
        raise AUSteerError(f"cannot fetch {url} into {path}: {_reason(error)}; run the same command to go on") from None
    found = sha256(part)
    if expected and not found.startswith(expected):
        part.unlink()  # a wrong file would only be continued
        raise AUSteerError(
            f"{url} has SHA-256 {found[:12]}..., not {expected[:12]}...: it was not kept; try again later"
        )
    os.replace(part, path)


def _continue(url: str, part: Path) -> bool:
    """Fetch the rest of a file; False if the connection broke off, or what is there cannot be continued."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "AUSteer"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                part.open("ab" if resumed else "wb") as file,
                tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar,
            ):
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        return total is None or _size(part) == total
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing behind what is there: it was complete, or is of another file
            part.unlink()
            return False
        raise
    except (http.client.IncompleteRead, ConnectionResetError, TimeoutError):
        return False


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error.strerror or type(error).__name__)


def hub_name(source: dict) -> str:
    config = f", {source['config']}" if source.get("config") else ""
    return f"{source['id']}{config} at {source['revision'][:12] if source.get('revision') else 'main (not pinned)'}"


def hub_rows(task: str, split: str, source: dict) -> list[dict]:
    """Normalised rows of one split from the hub, at its pinned revision."""
    import datasets  # slow to import, and only the hub needs it

    try:
        table = datasets.load_dataset(
            source["id"], source.get("config"), split=source["split"], revision=source.get("revision")
        )
        raw = table.to_list()
    except Exception as error:  # no network, no such split, gated, ...: the library has a type for each
        raise AUSteerError(
            f"the hub gave no {hub_name(source)} ({type(error).__name__}: {_first_line(error)})"
        ) from None
    bar = tqdm(raw, desc=f"{task} {split}", unit="row")
    return normalise(task, split, ((f"{source['id']}, row {at}", row) for at, row in enumerate(bar, 1)))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:160]
