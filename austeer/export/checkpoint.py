"""Read and write a checkpoint folder on disk: its tensors are found by name, read and overwritten one at a time.

Folding and adapters share this reader, and nothing is loaded whole. A new checkpoint is a copy of the files in which
single tensors are then overwritten in place: the layout stays, so undoing restores the very same files.

Files may name and cut tensors otherwise than the model does: without the prefix "transformer.", or experts one by one.
transformers knows how it loads them, and is asked here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import local_torch_dtype

import rmodels
from austeer.errors import AUSteerError, first_line
from austeer.export.weights import Edit, find_edits
from austeer.files import sha256
from austeer.identity import check_made_for, hash_weights
from austeer.plan import Plan
from rmodels import LinearMap, sources

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


@dataclass
class Origin:
    """Say which stored tensors make up a weight of the model, by the pattern of the converter that combines them."""

    first: str  # of the weights that come out of the converter
    converter: WeightConverter | None  # None: one stored tensor is the weight
    stored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        return [name for names in self.stored.values() for name in names]

    @property
    def operations(self) -> list[ConversionOps]:
        return self.converter.operations if self.converter else []


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

    def edits(self, plan: Plan) -> list[Edit]:
        """Return what the plan does to the weights of the model that these files hold."""
        edits = find_edits(plan, self.skeleton)
        for edit in edits:
            if any(name not in self.origins for name in (edit.weight, edit.bias) if name):
                raise AUSteerError(
                    f"the checkpoint lacks the weight at site {edit.site} of layer {edit.layer}: get the whole checkpoint "
                    "of the plan's model"
                )
        return edits

    def in_files(self, edit: Edit) -> list[Edit]:
        """Return the edit as edits of stored tensors: one, or one per expert where experts are stored one by one."""
        weights = self._pieces(edit.weight, edit.map)
        biases = self._pieces(edit.bias, edit.map) if edit.bias else [(None, edit.map)] * len(weights)
        pieces = [
            replace(linear, weight=weight, bias=bias)
            for (weight, linear), (bias, _) in zip(weights, biases, strict=True)
        ]
        if len(pieces) == 1:
            return [replace(edit, map=pieces[0])]
        return [edit.of_expert(index, piece) for index, piece in enumerate(pieces)]

    def _pieces(self, name: str, linear: LinearMap) -> list[tuple[str, LinearMap]]:
        """Return the stored tensors that make up a weight, each with its axes; refuse what cannot be changed in place."""
        origin, shape = self.origins[name], tuple(self.skeleton.get_parameter(name).shape)
        stored, how = origin.names, origin.operations
        if [type(one) for one in how] == [MergeModulelist] and how[0].dim == 0 and len(origin.stored) == 1:
            shape = shape[1:]
        elif [type(one) for one in how] == [Transpose] and {how[0].dim0, how[0].dim1} == {
            len(shape) - 2,
            len(shape) - 1,
        }:
            if not (how[0].check_dims and self.shapes[stored[0]] == shape):
                shape = (*shape[:-2], shape[-1], shape[-2])
                linear = replace(linear, inputs=linear.outputs, outputs=linear.inputs)
        elif how:
            raise AUSteerError(f"{stored[0]} is one of several tensors that {name} is computed from; steer live")
        if wrong := [one for one in stored if self.shapes[one] != shape]:
            raise AUSteerError(f"{wrong[0]} has shape {self.shapes[wrong[0]]}, the model's {name} wants {shape}")
        return [(one, linear) for one in stored]

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
            dtypes = self._dtypes(dtype)
            names = tqdm(dtypes, desc="compare with the plan's model", unit="tensor")
            self._fingerprints[dtype] = hash_weights((name, self.as_loaded(name).to(dtypes[name])) for name in names)
        return self._fingerprints[dtype]

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return the dtype of each weight in a model loaded in `dtype`: some stay float32 whatever is asked for."""
        with local_torch_dtype(dtype):
            dtypes = {
                name: weight.dtype for name, weight in rmodels.skeleton(self.skeleton.config).state_dict().items()
            }
        kept, patterns, _ = build_glob_alternation(list(plan := self.skeleton._get_dtype_plan(dtype)))
        for name in dtypes if plan else ():
            if match := kept.search(name):
                dtypes[name] = plan[patterns[match.lastgroup]]
        return dtypes

    def as_loaded(self, name: str) -> Tensor:
        """Return a tensor as transformers loads it: renamed, tied to another, or combined from several."""
        ties = self.skeleton.all_tied_weights_keys.items()
        tied = [other for pair in ties if name in pair for other in pair if other in self.origins]
        name = name if name in self.origins or not tied else tied[0]
        origin = self.origins.get(name)
        if origin is None or origin.converter is None:
            return self.read(origin.names[0] if origin else name)
        converter = deepcopy(origin.converter)
        for pattern, names in origin.stored.items():
            for stored in names:
                converter.add_tensor(origin.first, stored, pattern, self.read(stored))
        loaded = converter.convert(origin.first, model=self.skeleton, config=self.skeleton.config)[name]
        return loaded[0] if isinstance(loaded, list) else loaded

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Return the origin of each weight of the model, as transformers finds it when it loads these files."""
        transforms = get_model_conversion_mapping(self.skeleton)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, weights = self.skeleton.base_model_prefix, self.skeleton.state_dict()
        origins: dict[str, Origin] = {}
        for stored in sorted(self.places, key=dot_natural_key):
            first, pattern = rename_source_key(stored, renamings, converters, prefix, weights)
            if first not in weights and stored in weights:
                first, pattern = rename_source_key(stored, [], [], prefix, weights)
            converter = by_pattern.get(pattern)
            patterns = converter.target_patterns if converter else [first]
            for name in {first.replace(patterns[0], other) for other in patterns} & set(weights):
                origins.setdefault(name, Origin(first, converter)).stored[pattern or stored].append(stored)
        return origins

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
