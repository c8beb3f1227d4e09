"""Linear-AcT: each AU is moved by an affine map from the values it takes on wrong texts to those on right texts.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", arXiv 2410.23054. In one
dimension optimal transport pairs the sorted values a (wrong texts) with the sorted values b (right texts). The
affine map that fits it best in least squares has a closed form, per AU:

    omega = sum (a - mean a)(b - mean b) / sum (a - mean a)^2,     beta = mean b - omega mean a
    x -> (1 - lambda) x + lambda (omega x + beta) = x + x * lambda (omega - 1) + lambda beta

Sorting ignores which text belongs to which pair. The paper differs: it averages activations over tokens, where all
methods here read the answer's last token, and it prefers to fit layer by layer, each on top of the maps below it,
where this file fits all layers at once. Beyond lambda = 1 the map is extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.base import GridPoint, Method
from austeer.plan import Plan

LAMBDAS = {"small": (0.25, 0.5, 1.0, 2.0, 4.0), "full": (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)}
ALL, LOWER, UPPER = 0, 1, 2  # which layers: all, the lower half, the upper half
PARTS = dict.fromkeys(LAMBDAS, (LOWER, UPPER, ALL))
CONSTANT = 1e-5  # a spread below this share of an AU's size is rounding, and no slope can be fitted to it


@dataclass
class Transport:
    """Hold omega and beta of every AU, (layers, width)."""

    omega: Tensor
    beta: Tensor
    header: dict


class LinearAcT(Method):
    name, label = "linear-act", "Linear-AcT"
    paper = "Rodriguez et al., arXiv 2410.23054 (read at the last token, all layers at once)"
    edits = "all AUs of all or half the layers, scaled and shifted"
    sites = ("attention", "ffn", "layer", "neuron")
    axes = {"lambda": LAMBDAS, "layers": PARTS}

    def prepare(self, evidence: Evidence) -> Transport:
        right, wrong = evidence.activations()
        return Transport(*fit(wrong, right), evidence.header() | {"method": self.name})

    def plan(self, prepared: Transport, point: GridPoint, draw: int = 0) -> Plan:
        strength, site = point["lambda"], prepared.header["site"]
        mask = half(len(prepared.omega), point["layers"])[:, None]
        scale = torch.where(mask, strength * (prepared.omega - 1), 0.0)
        shift = torch.where(mask, strength * prepared.beta, 0.0)
        return Plan({site: scale}, {site: shift}, header=prepared.header | point)


def fit(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return omega and beta of the map from source to target, both (samples, ...) with the same number of samples.

    An AU that is constant in the source has no slope: it is shifted by the difference of the means, omega = 1.
    """
    a, b = source.double().sort(0).values, target.double().sort(0).values
    mean_a, mean_b = a.mean(0), b.mean(0)
    spread = (a - mean_a).square().sum(0)
    constant = (spread / len(a)).sqrt() <= CONSTANT * a.abs().amax(0)
    slope = ((a - mean_a) * (b - mean_b)).sum(0) / torch.where(constant, 1.0, spread)
    omega = torch.where(constant, 1.0, slope)
    return omega.float(), (mean_b - omega * mean_a).float()


def half(layers: int, which: float) -> Tensor:
    """Mark the layers that are moved, (layers,) of bool. The middle one of an odd number is in the upper half."""
    upper = torch.arange(layers) >= layers // 2
    if which not in (ALL, LOWER, UPPER):
        raise AUSteerError(f"layers must be {ALL} (all), {LOWER} (the lower half) or {UPPER} (the upper), not {which}")
    return {ALL: torch.ones(layers, dtype=torch.bool), LOWER: ~upper, UPPER: upper}[int(which)]


METHODS = (LinearAcT(),)
