"""CAA: Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, ACL 2024, equation 1.

The mean difference of the residual stream between right and wrong answers, times a multiplier, is added behind one
layer, from the prompt's last token on. The authors read at an answer's letter, the last token but one of "(A)"
(readout="before-last"); where answers are bare, as in AUSteer's tasks, that is the last token, the default here, and
for open answers the mean over the answer (readout="answer").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import READOUTS, Evidence
from austeer.methods.base import Method, Settings
from austeer.plan import Plan

# depth: the layer as a share of all layers; 0.4 is the authors' layer 13 of 32. alpha: their multiplier
DEPTHS = {"small": (0.25, 0.5, 0.75), "full": (0.25, 0.4, 0.5, 0.6, 0.75)}
ALPHAS = {"small": (0.5, 1.0, 3.0, 10.0, 30.0), "full": (0.5, 1.0, 2.0, 3.0)}
NORMS = ("own", "mean")


@dataclass(frozen=True)
class Vectors:
    by_layer: Tensor  # (layers, hidden)
    header: dict


class CAA(Method):
    name, label = "caa", "CAA"
    paper = "Rimsky et al., ACL 2024"
    edits = "the residual stream behind one layer, shifted"
    sites = ("layer",)
    foldable = False

    def __init__(self, readout: str = "last", norm: str = "own"):
        """norm="mean" gives the vectors of all layers the length of their mean, so that a multiplier means the same
        everywhere. The authors do so with the vectors of several behaviours; of one behaviour, layers are what differ."""
        if readout not in READOUTS or norm not in NORMS:
            raise AUSteerError(f"CAA has readouts {', '.join(READOUTS)} and norms {', '.join(NORMS)}")
        self.readout, self.norm = readout, norm

    def grid(self, kind: str) -> list[Settings]:
        return [{"depth": depth, "alpha": alpha} for alpha, depth in product(ALPHAS[kind], DEPTHS[kind])]

    def prepare(self, evidence: Evidence) -> Vectors:
        vectors = mean_difference(*evidence.activations(self.readout))
        if self.norm == "mean":
            vectors = match_norms(vectors)
        return Vectors(vectors, {**evidence.header(), "method": self.name})

    def plan(self, prepared: Vectors, settings: Settings, draw: int = 0) -> Plan:
        if not 0 <= settings["depth"] < 1:
            raise AUSteerError(f"depth is a share of the layers, from 0 to below 1, not {settings['depth']}")
        layers = len(prepared.by_layer)
        layer = min(layers - 1, round(settings["depth"] * layers))
        shift = torch.zeros_like(prepared.by_layer)
        shift[layer] = settings["alpha"] * prepared.by_layer[layer]
        return Plan({}, {"layer": shift}, "last", {**prepared.header, **settings, "layer": layer})


def mean_difference(right: Tensor, wrong: Tensor) -> Tensor:
    return (right.double() - wrong.double()).mean(0).float()


def match_norms(vectors: Tensor) -> Tensor:
    """Every vector as long as they are on average; zero stays zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors * (length.mean() / length), 0.0)


METHODS = (CAA(),)
