"""Read and write files: whole or not at all, and JSON Lines and safetensors in one way each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from austeer.errors import AUSteerError


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
