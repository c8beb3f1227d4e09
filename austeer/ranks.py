"""AURanks: every atomic unit (AU) of one site with its score and direction. Screening returns them.

They are saved as one safetensors file, whose JSON header names the model, the pairs and the protocol. The authors'
three files, all_scores.pt, all_layer_ids.pt and all_indices.pt, can be read and written, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.files import read_tensors, write_tensors
from austeer.plan import SHAPE_KEYS, au_name
from rmodels import SITES

FORMAT = "austeer-ranks-1"
AUTHORS_FILES = ("all_scores.pt", "all_layer_ids.pt", "all_indices.pt")
COMMON_CUTS = (1, 2, 4, 8, 16, 32, 50, 64, 80, 100)


def ranks_file(path: str | Path, site: str) -> Path:
    """Return where the ranks of a site go: `path` itself, or <site>.safetensors in it if it names a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"{site}.safetensors"


@dataclass
class AURanks:
    """Hold score and gain of every AU, both (layers, width) float32.

    score: signed; AUs are ranked by its magnitude. gain: what `set_MFU` multiplies by alpha. For activation momentum
    both are the paper's signed share of pairs; for causal momentum score is the t statistic and gain its sign.
    stats: the sums that both are computed from, by name. header: their origin, as JSON values.
    """

    site: str
    score: Tensor
    gain: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    header: dict = field(default_factory=dict)

    @cached_property
    def exists(self) -> Tensor:
        """Return which numbers are AUs, (layers, width): a layer may be narrower than the widest."""
        layers, width = self.score.shape
        return torch.arange(width) < torch.tensor(self.header.get(f"widths.{self.site}", [width] * layers))[:, None]

    @property
    def lies(self) -> Tensor:
        """Return which AUs a check has flagged because first order mispredicts them, (layers, width)."""
        return self.stats.get("lies", torch.zeros_like(self.score, dtype=torch.bool))

    @cached_property
    def order(self) -> Tensor:
        """Return flat AU numbers (layer * width + dim), best first; ties go to the lower layer, then dimension."""
        order = torch.sort(self.score.flatten().abs(), descending=True, stable=True).indices
        return order[self.exists.flatten()[order]]

    def __iter__(self) -> Iterator[list]:
        """Unpack as the authors' `all_scores, all_layer_ids, all_indices`."""
        if (self.header.get("momentum") or "").startswith("causal"):
            raise AUSteerError(
                "the authors' lists have one number an AU, so causal ranks do not fit: use set_MFU(ranks, k, alpha)"
            )
        layers, width = self.score.shape
        yield self.score.flatten().tolist()
        yield [layer for layer in range(layers) for _ in range(width)]
        yield [[dim, dim + 1] for _ in range(layers) for dim in range(width)]

    def ties(self, k: int) -> int:
        """Count the AUs outside the best k that score exactly as the k-th does: a cut there is arbitrary."""
        magnitude = self.score.flatten().abs()[self.order]
        if not 1 <= k < len(magnitude):
            return 0
        return int((magnitude[k:] == magnitude[k - 1]).sum())

    def top(self, k: int) -> list[tuple[int, int, float]]:
        """Return the best k as (layer, dim, score)."""
        width = self.score.shape[1]
        return [(au // width, au % width, float(self.score.flatten()[au])) for au in self.order[:k].tolist()]

    def name(self, layer: int, dim: int) -> str:
        return au_name(self.header, self.site, self.score.shape[1], layer, dim)

    def origin(self) -> dict:
        """Return what the header of a plan keeps of these ranks."""
        keys = ("model", "family", "fingerprint", "precision", "momentum", "pairs_hash")
        special = {key: value for key, value in self.header.items() if key.startswith((*SHAPE_KEYS, "converted_from"))}
        return {key: self.header.get(key) for key in keys} | {"site": self.site} | special

    def summary(self, seconds: float) -> str:
        """Say what was ranked, how fast, which AUs came out best, and at which temperature of the objective."""
        (layers, width), pairs = self.score.shape, self.header["pairs"]
        best = ", ".join(f"({layer}, {self.name(layer, dim)}) {score:+.3f}" for layer, dim, score in self.top(5))
        lines = [
            f"{layers} x {width} AUs at site {self.site}, {pairs} pairs, {pairs / seconds:.1f} pairs/s",
            f"  best (layer, dim): {best}; {self.ties(100)} more tie with the 100th",
        ]
        if "tau" in self.header:
            spread = self.header["spread_of_log_odds"]
            lines.append(
                f"  temperature {self.header['tau']:g} ({self.header['tau_by']}); log-odds spread by {spread:g}"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        header = {**self.header, "ties_at_cut": {str(k): self.ties(k) for k in COMMON_CUTS if k <= self.score.numel()}}
        tensors = {"score": self.score, "gain": self.gain, **{f"stats.{name}": t for name, t in self.stats.items()}}
        metadata = {"format": FORMAT, "site": self.site, "header": json.dumps(header, sort_keys=True)}
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, site: str | None = None) -> AURanks:
        """Read a ranks file, or a folder of the authors' files, whose site is `site` or else the folder's name."""
        path = Path(path)
        if path.is_dir():
            return cls.load_authors(path, site)
        tensors, metadata = read_tensors(path, FORMAT, "ranks")
        stats = {name.removeprefix("stats."): t for name, t in tensors.items() if name.startswith("stats.")}
        return cls(metadata["site"], tensors["score"], tensors["gain"], stats, json.loads(metadata["header"]))

    @classmethod
    def load_authors(cls, folder: str | Path, site: str | None = None) -> AURanks:
        """Read the authors' three lists. They do not name their site: pass it, or name the folder after it."""
        folder = Path(folder)
        site = site or folder.name
        if site not in SITES:
            raise AUSteerError(f"{folder}: its files do not name their site; pass site= (--site): {', '.join(SITES)}")
        lists = []
        for name in AUTHORS_FILES:
            try:
                lists.append(torch.load(folder / name, weights_only=True, map_location="cpu"))
            except FileNotFoundError:
                raise AUSteerError(
                    f"{folder} has no {name}; the authors' ranks are {', '.join(AUTHORS_FILES)}"
                ) from None
            except Exception as error:  # a refused unpickling may raise many types of errors
                raise AUSteerError(
                    f"{folder / name} is damaged or is not a plain list of numbers, and was not read; "
                    "save it as such a list"
                ) from error
        return cls.from_lists(*lists, site=site, header={"source": "authors' files"})

    @classmethod
    def from_lists(cls, all_scores, all_layer_ids, all_indices, site: str, header: dict | None = None) -> AURanks:
        scores = torch.tensor([float(s) for s in all_scores], dtype=torch.float64)
        layers = torch.tensor([int(layer) for layer in all_layer_ids])
        # an index is the window [dim, dim + 1)
        dims = torch.tensor([int(window[0] if hasattr(window, "__len__") else window) for window in all_indices])
        if not len(scores) == len(layers) == len(dims) or len(scores) == 0:
            raise AUSteerError("the authors' three lists are empty or differ in length: give one set's files")
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
