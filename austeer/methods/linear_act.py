"""Linear-AcT: every unit moved by a map between the values it takes on wrong and on right texts.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", arXiv 2410.23054. In one
dimension optimal transport pairs the sorted values a (wrong texts) with the sorted values b (right texts). The
affine map closest to it in least squares has a closed form, per unit:

    omega = sum (a - mean a)(b - mean b) / sum (a - mean a)^2,     beta = mean b - omega mean a
    x -> (1 - lambda) x + lambda (omega x + beta) = x + x * lambda (omega - 1) + lambda beta

The sorting forgets which text belongs to which pair. Not theirs: activations are read at the answer's last token,
as for all methods here (they average over tokens), and all layers at once (they prefer layer by layer, each behind
the maps below it). Beyond lambda = 1 the map is extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.identity import model_header
from austeer.methods.base import Method, Settings
from austeer.pairs import pairs_hash
from austeer.plan import Plan

LAMBDAS = {"small": (0.25, 0.5, 1.0, 2.0, 4.0), "full": (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)}
ALL, LOWER, UPPER = 0, 1, 2  # which layers: all, the lower half, the upper half
CONSTANT = 1e-5  # a spread below this share of the unit's size is rounding, and no slope can be fitted to it


@dataclass
class Transport:
    """omega and beta of every unit, (layers, width)."""

    omega: Tensor
    beta: Tensor
    header: dict


class LinearAcT(Method):
    name, label = "linear-act", "Linear-AcT"
    paper = "Rodriguez et al., arXiv 2410.23054 (read at the last token, all layers at once)"
    edits = "all units of all or half the layers, scaled and shifted"
    sites = ("attention", "ffn", "layer", "neuron")

    def grid(self, kind: str) -> list[Settings]:
        return [
            {"lambda": strength, "layers": layers} for strength, layers in product(LAMBDAS[kind], (LOWER, UPPER, ALL))
        ]

    def prepare(self, evidence: Evidence) -> Transport:
        right, wrong = evidence.activations()
        header = {"method": self.name, "site": evidence.site, "pairs_hash": pairs_hash(evidence.pairs)}
        return Transport(*fit(wrong, right), model_header(evidence.model) | header)

    def plan(self, prepared: Transport, settings: Settings, draw: int = 0) -> Plan:
        strength, site = settings["lambda"], prepared.header["site"]
        chosen = half(len(prepared.omega), settings["layers"])[:, None]
        scale = torch.where(chosen, strength * (prepared.omega - 1), 0.0)
        shift = torch.where(chosen, strength * prepared.beta, 0.0)
        return Plan({site: scale}, {site: shift}, header=prepared.header | settings)


def fit(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """omega and beta of the map from source to target, each (samples, ...) with as many samples.

    A unit that is constant in the source has no slope: it is shifted by the difference of the means, omega = 1.
    """
    a, b = source.double().sort(0).values, target.double().sort(0).values
    mean_a, mean_b = a.mean(0), b.mean(0)
    spread = (a - mean_a).square().sum(0)
    constant = (spread / len(a)).sqrt() <= CONSTANT * a.abs().amax(0)
    slope = ((a - mean_a) * (b - mean_b)).sum(0) / torch.where(constant, 1.0, spread)
    omega = torch.where(constant, 1.0, slope)
    return omega.float(), (mean_b - omega * mean_a).float()


def half(layers: int, which: float) -> Tensor:
    """Which layers are moved, (layers,) of bool. Of an odd number the middle one is in the upper half."""
    upper = torch.arange(layers) >= layers // 2
    if which not in (ALL, LOWER, UPPER):
        raise AUSteerError(f"layers is {ALL} (all), {LOWER} (the lower half) or {UPPER} (the upper half), not {which}")
    return {ALL: torch.ones(layers, dtype=torch.bool), LOWER: ~upper, UPPER: upper}[int(which)]


METHODS = (LinearAcT(),)
