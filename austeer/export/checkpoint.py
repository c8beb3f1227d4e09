"""Read and write a checkpoint folder on disk: its tensors are found by name, read and overwritten one at a time.

Folding and adapters share this reader, and nothing is loaded whole. A new checkpoint is a copy of the files in which
single tensors are then overwritten in place: the layout stays, so undoing restores the very same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

import rmodels
from austeer.errors import AUSteerError, first_line
from austeer.files import sha256
from austeer.identity import check_made_for, hash_weights
from austeer.plan import Plan
from rmodels import sources

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # in transformers' order of preference
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")  # copied with the weights
SECOND_COPY = "consolidated*"  # Mistral's repositories hold all weights twice, once for other readers


def stored_dtype(plan: Plan) -> str:
    """Return the dtype that a GGUF file must be converted to so that the plan fits: the one in which it was ranked."""
    precision = plan.header.get("precision")
    return precision if precision in rmodels.DTYPES else "auto"


def local_folder(name_or_path: str | Path) -> Path:
    """Return a folder unchanged, and for a hub id its snapshot, downloaded if it is not there yet."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        patterns = ["*.safetensors", *COMPANIONS]
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, ignore_patterns=SECOND_COPY))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = first_line(error)
        raise AUSteerError(f"{name_or_path} is not a folder, and the hub does not offer it ({reason})") from error


@dataclass(frozen=True)
class Place:
    """Say where a tensor's bytes are."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint:
    """Hold a checkpoint's table of contents; tensors are read and written by name."""

    def __init__(self, name_or_path: str | Path, dtype: str = "auto"):
        self.name = sources.local(name_or_path, dtype)
        self.folder = local_folder(self.name)
        self.config = self._json("config.json")
        if "quantization_config" in self.config:
            raise AUSteerError(
                f"{self.folder} is quantised: its numbers are rounded to a grid, which a scaled row leaves; "
                "export the checkpoint it was made from and quantise the result, or steer live"
            )
        self.files = self._weight_files()
        self.places = {name: place for file in self.files for name, place in self._places(file)}
        self.shapes = {name: place.shape for name, place in self.places.items()}
        self._fingerprints: dict[torch.dtype, str] = {}

    def dtype(self, name: str) -> torch.dtype:
        stored = self.places[name].dtype
        if stored not in DTYPES:
            raise AUSteerError(f"{name} is stored as {stored}: only weights in {', '.join(DTYPES)} can be exported")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return a view into the file: only what is used is read, and changes stay in memory (copy on write)."""
        if name not in self.places:
            raise AUSteerError(
                f"{self.folder} lacks {name}; get the whole checkpoint (renamed weights cannot be exported)"
            )
        return self.read_bytes(name).view(self.dtype(name)).view(self.shapes[name])

    def read_bytes(self, name: str) -> Tensor:
        place = self.places[name]
        data = np.memmap(self.folder / place.file, np.uint8, "c", place.start, (place.size,))
        return torch.from_numpy(data)

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor by one of the same shape and dtype."""
        place = self.places[name]
        assert tensor.shape == place.shape and tensor.dtype == self.dtype(name)
        with open(self.folder / place.file, "r+b") as file:
            file.seek(place.start)
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))

    def copy_to(self, folder: Path) -> dict[str, str]:
        """Copy weights and what goes with them (no other formats, no code); return each weight file's SHA-256."""
        companions = {path.name for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        indexes = {path.name for path in self.folder.glob("*.index.json")}
        if self.files != [SINGLE]:  # readers prefer a single file, and an index beside it names other files
            indexes -= {INDEX}
        for name in sorted(companions - indexes):
            with open(folder / name, "wb") as copy:
                sha256(self.folder / name, copy)
        hashes = {}
        total = sum((self.folder / name).stat().st_size for name in self.files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="copy") as bar:
            for name in self.files:
                with open(folder / name, "wb") as copy:
                    hashes[name] = sha256(self.folder / name, copy, bar)
        return hashes

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan made for another model: other shapes, another family, or other weights."""
        check_made_for(self.skeleton, {site: plan.shape(site) for site in plan.sites}, plan.header, "this plan was")
        dtype = rmodels.DTYPES.get(plan.header.get("precision"))
        if dtype is None or not plan.header.get("fingerprint"):
            return  # made by hand, or on quantised weights, which have other bits
        if self.fingerprint(dtype) != plan.header["fingerprint"]:
            raise AUSteerError(
                f"this plan was made on other weights ({plan.header.get('model')}) than those of {self.folder}; "
                "export that model, or rank this one"
            )

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """Build the patched model without its weights, so that it takes no memory."""
        try:
            config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise AUSteerError(f"cannot read the config of {self.folder}: {first_line(error)}") from error
        return rmodels.skeleton(config)

    def fingerprint(self, dtype: torch.dtype) -> str:
        """Return the fingerprint of the model in this precision, reading the weights once for any number of plans."""
        if dtype not in self._fingerprints:
            names = tqdm(self.skeleton.state_dict(), desc="compare with the plan's model", unit="tensor")
            self._fingerprints[dtype] = hash_weights((name, self.as_loaded(name).to(dtype)) for name in names)
        return self._fingerprints[dtype]

    def as_loaded(self, name: str) -> Tensor:
        """Return a tensor as transformers loads it: the head tied to the embedding, separate experts fused."""
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings", name not in self.places):
            name = "model.embed_tokens.weight"
        fused = re.fullmatch(r"(.+\.experts)\.(down_proj|gate_up_proj)", name)
        if fused is None or name in self.places:
            return self.read(name)
        halves = ("down_proj",) if fused[2] == "down_proj" else ("gate_proj", "up_proj")
        count = sum(key.startswith(f"{fused[1]}.") and key.endswith("down_proj.weight") for key in self.places)
        experts = ([self.as_loaded(f"{fused[1]}.{i}.{half}.weight") for half in halves] for i in range(count))
        return torch.stack([torch.cat(expert) for expert in experts])

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise AUSteerError(f"{self.folder} has no readable {name}: name a checkpoint folder") from error

    def _weight_files(self) -> list[str]:
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if not (self.folder / INDEX).exists():
            raise AUSteerError(
                f"{self.folder} has no {SINGLE} and no {INDEX}: only safetensors checkpoints can be exported: convert it first"
            )
        files = sorted(set(self._json(INDEX)["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise AUSteerError(f"{self.folder / INDEX} names files outside its folder")
        return files

    def _places(self, file: str) -> Iterator[tuple[str, Place]]:
        try:
            with safetensors.safe_open(self.folder / file, framework="pt"):
                pass  # checks header, offsets and length
        except (OSError, safetensors.SafetensorError) as error:
            raise AUSteerError(f"{self.folder / file} is missing or damaged ({error}); get it again") from error
        with open(self.folder / file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, Place(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
