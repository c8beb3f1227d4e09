"""Read and write files: whole or not at all, and JSON Lines and safetensors in one way each."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from austeer.errors import AUSteerError, first_line

CHUNK = 1 << 24


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a killed process leaves no half file."""
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AUSteerError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_whole(path, write)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise AUSteerError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise AUSteerError(f"{path}: not JSON ({error.msg}, column {error.colno})") from None


def read_text(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise AUSteerError(f"no such file: {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise AUSteerError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AUSteerError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def check_writable(path: Path) -> None:
    """Make the folder of a future file, so that a place nobody may write to shows before the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AUSteerError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Let the caller fill a temporary folder beside `out`: renamed at the end, removed if anything goes wrong."""
    out = Path(out)
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _name_leftovers(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise AUSteerError(f"cannot write {out}: {error.strerror}") from error
    try:
        (temporary / out.name).mkdir()
        yield temporary / out.name
        (temporary / out.name).rename(out)
    except (OSError, safetensors.SafetensorError) as error:
        raise AUSteerError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let only one process at a time create `path`. The others print that they are waiting."""
    check_writable(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))  # freed by the system if its process is killed
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"another process is making {path}: waiting for it", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise AUSteerError(f"cannot lock {path}: {first_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


def check_new(out: str | Path) -> None:
    """Refuse a place that is taken or cannot be written to, before the work."""
    out = Path(out)
    if out.exists():
        raise AUSteerError(f"{out} exists already; remove it or choose another place")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise AUSteerError(f"cannot write {out}: {above} is not a folder that can be written to")


def _name_leftovers(out: Path) -> None:
    """Print what a run that could not clean up (SIGKILL, a power cut) left beside `out`."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\w{{8}}")  # mkdtemp's names
    leftovers = sorted(str(path) for path in out.parent.glob(".*") if pattern.fullmatch(path.name))
    if leftovers:
        note = "belongs to another run; if that run was killed, remove it"
        print(f"note: {', '.join(leftovers)}: {note}", file=sys.stderr)


def sha256(path: Path, copy: BinaryIO | None = None, bar: tqdm | None = None) -> str:
    """Hash a file, and write it to `copy` on the way if that is given."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
        if bar is not None:
            bar.update(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:  # errors of reading only: what the caller does between two chunks is not caught here
        raise AUSteerError(f"cannot read {path}: {error.strerror}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    ready = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_readable(ready, temporary, metadata))


def save_readable(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save with the mode of any new file: safetensors' own files can be read by their owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path, wanted_format: str, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one of this project's safetensors files whole, with its metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise AUSteerError(f"no such file: {path}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise AUSteerError(f"{path} is damaged or is not a safetensors file ({error}); make it again") from error
    if metadata.get("format") != wanted_format:
        raise AUSteerError(f"{path} is not a {kind} file of this project (format {metadata.get('format')!r})")
    return tensors, metadata
