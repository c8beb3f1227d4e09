"""AURanks: every atomic unit of one site with its score and direction. The result of screening.

Saved as one safetensors file with a JSON header that says which model, pairs and protocol they belong
to. Also reads and writes the authors' three files, all_scores.pt, all_layer_ids.pt and all_indices.pt.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from austeer.errors import AUSteerError
from rmodels import SITES, gates, site_shape

FORMAT = "austeer-ranks-1"
AUTHORS_FILES = ("all_scores.pt", "all_layer_ids.pt", "all_indices.pt")
BLOCK = 1 << 24  # weights hashed at once
COMMON_CUTS = (1, 2, 4, 8, 16, 32, 50, 64, 80, 100)


@dataclass
class AURanks:
    """score and gain are (layers, width) float32.

    score: signed; AUs are ranked by its magnitude. gain: what `set_MFU` multiplies by alpha. For
    activation momentum both are the paper's signed share of pairs; for causal momentum score is the t
    statistic and gain its sign.
    stats: the sums they come from, by name. header: where they come from, as JSON values.
    """

    site: str
    score: Tensor
    gain: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    header: dict = field(default_factory=dict)

    @cached_property
    def order(self) -> Tensor:
        """Flat unit numbers (layer * width + dim), best first; ties go to the lower layer, then dimension."""
        return torch.sort(self.score.flatten().abs(), descending=True, stable=True).indices

    def __iter__(self) -> Iterator[list]:
        """Unpacks as the authors' `all_scores, all_layer_ids, all_indices`."""
        if self.header.get("momentum") == "causal":
            raise AUSteerError(
                "the authors' lists hold one number per AU, so causal ranks do not fit: use set_MFU(ranks, k, alpha)"
            )
        layers, width = self.score.shape
        yield self.score.flatten().tolist()
        yield [layer for layer in range(layers) for _ in range(width)]
        yield [[dim, dim + 1] for _ in range(layers) for dim in range(width)]

    def ties(self, k: int) -> int:
        """How many AUs outside the best k score exactly as the k-th does: cut there, chance decides."""
        magnitude = self.score.flatten().abs()[self.order]
        if not 1 <= k < len(magnitude):
            return 0
        return int((magnitude[k:] == magnitude[k - 1]).sum())

    def top(self, k: int) -> list[tuple[int, int, float]]:
        """The best k as (layer, dim, score)."""
        width = self.score.shape[1]
        return [(u // width, u % width, float(self.score.flatten()[u])) for u in self.order[:k].tolist()]

    def save(self, path: str | Path) -> None:
        header = {**self.header, "ties_at_cut": {str(k): self.ties(k) for k in COMMON_CUTS if k <= self.score.numel()}}
        tensors = {"score": self.score, "gain": self.gain, **{f"stats.{name}": t for name, t in self.stats.items()}}
        metadata = {"format": FORMAT, "site": self.site, "header": json.dumps(header, sort_keys=True)}
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, site: str | None = None) -> AURanks:
        """Read a ranks file, or a folder of the authors' (whose site is `site`, or the folder's name)."""
        path = Path(path)
        if path.is_dir():
            return cls.load_authors(path, site)
        tensors, metadata = read_tensors(path, FORMAT, "ranks")
        stats = {name.removeprefix("stats."): t for name, t in tensors.items() if name.startswith("stats.")}
        return cls(metadata["site"], tensors["score"], tensors["gain"], stats, json.loads(metadata["header"]))

    @classmethod
    def load_authors(cls, folder: str | Path, site: str | None = None) -> AURanks:
        """Read the authors' three lists. They do not say their site: name it, or the folder by it."""
        folder = Path(folder)
        site = site or folder.name
        if site not in SITES:
            raise AUSteerError(
                f"{folder}: the authors' files do not say their site; pass site= (--site): {', '.join(SITES)}"
            )
        lists = []
        for name in AUTHORS_FILES:
            try:
                lists.append(torch.load(folder / name, weights_only=True, map_location="cpu"))
            except FileNotFoundError:
                raise AUSteerError(
                    f"{folder} has no {name}; the authors' ranks are {', '.join(AUTHORS_FILES)}"
                ) from None
            except Exception as error:  # a refused unpickling has many error types, all of them "no"
                raise AUSteerError(
                    f"{folder / name} is not a plain list of numbers or is damaged: it was not read"
                ) from error
        return cls.from_lists(*lists, site=site, header={"source": "authors' files"})

    @classmethod
    def from_lists(cls, all_scores, all_layer_ids, all_indices, site: str, header: dict | None = None) -> AURanks:
        scores = torch.tensor([float(s) for s in all_scores], dtype=torch.float64)
        layers = torch.tensor([int(layer) for layer in all_layer_ids])
        # an index is the window [dim, dim + 1)
        dims = torch.tensor([int(window[0] if hasattr(window, "__len__") else window) for window in all_indices])
        if not len(scores) == len(layers) == len(dims) or len(scores) == 0:
            raise AUSteerError("the authors' three lists are empty or differ in length: these are not one set of ranks")
        grid = torch.zeros(int(layers.max()) + 1, int(dims.max()) + 1)
        if grid.numel() != len(scores):
            raise AUSteerError(f"{len(scores)} scores do not fill {grid.shape[0]} layers of {grid.shape[1]} AUs")
        grid[layers, dims] = scores.float()
        return cls(site, grid, grid.clone(), {}, header or {})

    def save_authors(self, folder: str | Path) -> None:
        """Write the authors' three files: plain lists of numbers, which their code loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in zip(AUTHORS_FILES, self, strict=True):
            torch.save(values, folder / name)

    def check_model(self, model: nn.Module) -> None:
        check_made_for(model, {self.site: tuple(self.score.shape)}, self.header, "these ranks were")


def check_made_for(model: nn.Module, shapes: dict[str, tuple[int, int]], header: dict, what: str) -> None:
    """Refuse a model that ranks or a plan, with these shapes by site and this header, were not made for."""
    for site, made in shapes.items():
        shape = site_shape(model, site)
        if shape != tuple(made):
            raise AUSteerError(
                f"{what} made for {header.get('model', 'another model')}, site {site}: "
                f"{made[0]} layers of {made[1]} AUs; this model has {shape[0]} of {shape[1]}"
            )
    if not header:
        return
    if header.get("family") not in (None, model.config.model_type):
        raise AUSteerError(
            f"{what} made for a {header['family']} model ({header.get('model')}); this one is {model.config.model_type}"
        )
    theirs, ours = header.get("fingerprint"), fingerprint(model)
    # other precision, other bits: nothing to compare then but shapes and family
    if theirs and ours and precision(model) == header.get("precision") and theirs != ours:
        raise AUSteerError(
            f"{what} made on other weights ({header.get('model')}, fingerprint {theirs[:8]}; this model has {ours[:8]}); "
            "rank this model, or pass check=False to go on all the same"
        )


def check_writable(path: Path) -> None:
    """Make the folder of a file to come: a place that cannot be written to should show before the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AUSteerError(f"cannot write {path}: {error.strerror}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a temporary name and rename last: there is never half a file."""
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_readable({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AUSteerError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_readable(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file leaves a file that only its owner can read: this one has the mode of any new file."""
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
        raise AUSteerError(f"{path} is damaged or is no safetensors file ({error}); make it again") from error
    if metadata.get("format") != wanted_format:
        raise AUSteerError(f"{path} holds no {kind} of this project (format {metadata.get('format')!r})")
    return tensors, metadata


def precision(model: nn.Module) -> str:
    name = str(model.dtype).removeprefix("torch.")
    for bits in ("4bit", "8bit"):
        if getattr(model, f"is_loaded_in_{bits}", False):
            name += f"-{bits}"
    return name


_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str | None]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str | None:
    """A hash of every weight's name, shape and bits, as exact integer sums: same weights, same fingerprint.

    Sums of integers do not depend on their order, so CPU and GPU agree; sums of rows and of columns show which
    row or column differs, so reordering is seen too. None for a model whose weights are not all in memory. Kept
    per model until a weight is written to or replaced, because plans are checked every time they are applied.
    """
    state = tuple(
        (weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in model.parameters()
    )
    if model not in _fingerprints or _fingerprints[model][0] != state:
        _fingerprints[model] = (state, _fingerprint(model))
    return _fingerprints[model][1]


def _fingerprint(model: nn.Module) -> str | None:
    weights = model.state_dict()
    return None if any(weight.is_meta for weight in weights.values()) else hash_weights(weights.items())


def hash_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of weights that come one by one, in a model's order and dtype."""
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.detach().contiguous()
        if bits.dtype.is_floating_point:
            bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        rows = bits.reshape(len(bits), -1) if bits.dim() else bits.reshape(1, 1)
        place = [torch.arange(1, size + 1, device=bits.device) for size in rows.shape]
        blocks = rows.split(max(1, BLOCK // max(1, rows.shape[1])))  # torch makes an int64 copy of what it sums
        sums = (
            torch.cat([block.sum(1, dtype=torch.int64) for block in blocks]),
            sum(block.sum(0, dtype=torch.int64) for block in blocks),
        )
        totals = [int((total * at).sum()) for total, at in zip(sums, place, strict=True)]  # wraps around, exactly
        digest.update(f"{name} {tuple(weight.shape)} {totals};".encode())
    return digest.hexdigest()


def public_name(name_or_path: str) -> str:
    """A hub id as it is; of a local folder only its last two parts: ranks are given away, home folders are not."""
    return "/".join(Path(name_or_path).resolve().parts[-2:]) if Path(name_or_path).exists() else name_or_path


def model_header(model: nn.Module) -> dict:
    return {
        "model": public_name(model.config.name_or_path) or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "precision": precision(model),
        "family": model.config.model_type,
        "gates": len(list(gates(model))),
    }
