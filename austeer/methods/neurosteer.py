"""NeuroSteer: SAE neurons that fire more often on one kind of text than on the other, decoded into one residual.

Over all tokens of the texts of a kind, BOS included, n_i counts how often neuron i fires, and mu_i is its mean where it
fires. Right texts are the target and wrong ones the source; what both have in common is subtracted ("denoised"):

    dn = relu(n_target - n_source),   dmu = relu(mu_target - mu_source)
    residual = sum over the K largest dn of w_i W_dec[i],   w = dmu (dif_mean) or mu_target (tar_mean)
    h <- h + alpha * residual, at the layer that the SAE reads

For several behaviours at once, add their plans. In the authors' code neurons also fire on padding, which the kind with
shorter texts has more of; here padding never counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.files import read_tensors, write_tensors
from austeer.methods.base import GridPoint, Method
from austeer.plan import Plan
from austeer.sae import SITE, files_beside, find_sae, token_activations
from rmodels import site_shape

FORMAT = "austeer-neurons-1"
# Texts of a pair share their prompt, so their means hardly differ and dmu is small: hence alphas in the hundreds
KS = {"small": (4, 16, 64), "full": (100, 150, 600)}
ALPHAS = {"small": (16.0, 64.0, 256.0, 512.0, 1024.0), "full": (10.0, 15.0, 50.0, 100.0, 200.0, 400.0, 700.0)}
WEIGHTS = ("dif_mean", "tar_mean")
MODES = {"all": "every position", "last": "all but the last position", "last2": "all but the last two positions"}


@dataclass(frozen=True)
class Preset:
    """Hold the values in the authors' script of a task."""

    alpha: float
    k: int
    mode: str


PRESETS = {
    "sentiment": Preset(100.0, 100, "all"),
    "toxicity": Preset(101.0, 100, "last"),
    "politeness": Preset(10.0, 150, "all"),
    "stance": Preset(15.0, 150, "all"),
    "cot": Preset(20.0, 100, "last"),
}

# the SAEs that the authors take for their models; the first reads the input of layer 6, which is the output of layer 5
SAES = {
    "gpt2": "gpt2-small-res-jb/blocks.6.hook_resid_pre",
    "gemma-2-2b": "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
}


@dataclass(frozen=True)
class Neurons:
    """Hold how often and how strongly neurons fire: everything but K and alpha, so that one file serves them all."""

    counts: tuple[Tensor, Tensor]  # on right texts and on wrong ones, each (latents,)
    means: tuple[Tensor, Tensor]
    W_dec: Tensor
    layer: int
    shape: tuple[int, int]  # (layers, width) of the site
    header: dict

    def reversed(self) -> Neurons:
        return replace(self, counts=self.counts[::-1], means=self.means[::-1])

    def save(self, path: Path) -> None:
        """Write all but W_dec, which the SAE has."""
        tensors = {"counts": torch.stack(self.counts), "means": torch.stack(self.means)}
        values = {"layer": self.layer, "shape": self.shape, "header": self.header}
        write_tensors(path, tensors, {"format": FORMAT, "neurons": json.dumps(values, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, W_dec: Tensor) -> Neurons:
        tensors, metadata = read_tensors(path, FORMAT, "neuron")
        values = json.loads(metadata["neurons"])
        pair = {name: tuple(tensors[name]) for name in ("counts", "means")}
        return cls(**pair, W_dec=W_dec, layer=values["layer"], shape=tuple(values["shape"]), header=values["header"])


@dataclass(frozen=True)
class NeuroSteer(Method):
    """Steer along SAE neurons. cache_trap: the authors' hook skips passes of one token, so if a model generates with a
    key-value cache, only the prompt is steered. True steers as their code does; False steers the answer as well."""

    sae: str | None = None  # the name that austeer.sae.find_sae looks up
    weight: str = "dif_mean"
    normalize: bool = False  # the residual has norm 1
    mode: str = "all"
    cache_trap: bool = True
    preset: str | None = None  # use the preset's alpha, k and mode, without a search

    name, label = "neurosteer", "NeuroSteer"
    paper = "NeuroSteer"
    edits = "one layer, shifted along K SAE neurons"
    sites = (SITE,)
    foldable = False

    def __post_init__(self):
        if self.preset not in (None, *PRESETS):
            raise AUSteerError(f"preset {self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        if self.weight not in WEIGHTS:
            raise AUSteerError(f"weight {self.weight!r} is unknown; use one of {', '.join(WEIGHTS)}")
        if self.mode not in MODES:
            raise AUSteerError(f"mode {self.mode!r} has no token scope here; use one of {', '.join(MODES)}")
        _ = self.tokens

    @property
    def tokens(self) -> str:
        mode = PRESETS[self.preset].mode if self.preset else self.mode
        if mode == "all":
            return "prompt" if self.cache_trap else "all"
        if not self.cache_trap:
            raise AUSteerError(
                f"mode {mode!r} steers {MODES[mode]} of a pass, which only a prompt has; use mode all or "
                "cache_trap=True"
            )
        return {"last": "before-last", "last2": "before-last-2"}[mode]

    def grid(self, kind: str) -> list[GridPoint]:
        if self.preset:
            return [{"neurons": PRESETS[self.preset].k, "alpha": PRESETS[self.preset].alpha}]
        return [{"neurons": k, "alpha": alpha} for alpha, k in product(ALPHAS[kind], KS[kind])]

    def files(self, model):
        return {} if self.sae else files_beside(model)

    def prepare(self, evidence: Evidence) -> Neurons:
        sae = find_sae(evidence, self.sae)
        right, wrong = Firing(sae.latents), Firing(sae.latents)
        for shared, *own in token_activations(evidence, sae.layer):
            prompt = sae.encode(shared)
            for firing, answer in zip((right, wrong), own, strict=True):
                firing.add([prompt, sae.encode(answer)])
        if torch.equal(right.count, wrong.count) and torch.equal(right.total, wrong.total):
            raise AUSteerError("no neuron of the SAE fires differently on right and wrong texts; is it of this model?")
        header = evidence.header() | {"method": self.name, "sae": sae.header.get("source", self.sae)}
        shape = site_shape(evidence.model, SITE)
        counts, means = (right.count, wrong.count), (right.mean, wrong.mean)
        return Neurons(counts, means, sae.W_dec.cpu(), sae.layer, shape, header)

    def plan(self, prepared: Neurons, point: GridPoint, draw: int = 0) -> Plan:
        neurons = most_often(*prepared.counts, point["neurons"])
        residual = feature_residual(*prepared.means, neurons, prepared.W_dec, self.weight, self.normalize)
        shift = torch.zeros(prepared.shape)
        shift[prepared.layer] = point["alpha"] * residual
        return Plan({}, {SITE: shift}, self.tokens, {**prepared.header, **point, "weight": self.weight})


class Firing:
    """Count how often each neuron fires over tokens, and sum how strongly."""

    def __init__(self, latents: int):
        self.count = torch.zeros(latents, dtype=torch.int64)
        self.total = torch.zeros(latents, dtype=torch.float64)

    def add(self, texts: Iterable[Tensor]) -> None:
        """Add texts, each (tokens, latents)."""
        for z in texts:
            self.count += (z != 0).sum(0).cpu()
            self.total += (z.cpu() if z.is_mps else z).sum(0, dtype=torch.float64).cpu()  # mps has no float64

    @property
    def mean(self) -> Tensor:
        return torch.where(self.count > 0, self.total / self.count, 0.0)


def most_often(target: Tensor, source: Tensor, k: int) -> Tensor:
    """Return the K neurons with the largest relu(n_target - n_source). If fewer are above zero, the first other ones
    fill up, as in the authors' code; with dif_mean their weights may be above zero."""
    if isinstance(k, bool) or k != int(k) or not 1 <= k <= len(target):
        raise AUSteerError(f"k must be a whole number from 1 to {len(target)} (the neurons of the SAE), not {k}")
    return (target - source).relu().sort(descending=True, stable=True).indices[: int(k)]


def feature_residual(
    target: Tensor, source: Tensor, neurons: Tensor, W_dec: Tensor, weight: str = "dif_mean", normalize: bool = False
) -> Tensor:
    """Decode these neurons, weighted by their means over texts of both kinds, into a residual (width,)."""
    weights = (target - source).relu() if weight == "dif_mean" else target
    residual = weights[neurons].to(W_dec) @ W_dec[neurons]
    length = residual.norm()
    return residual / length if normalize and length > 0 else residual


METHODS = (NeuroSteer(),)
