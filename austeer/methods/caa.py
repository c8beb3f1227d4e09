"""CAA: Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, ACL 2024, equation 1.

The mean difference of the residual stream between right and wrong answers, times a multiplier, is added to the output
of one layer, from the prompt's last token on. The authors read at the answer's letter, the last token but one of "(A)"
(readout="before-last"). AUSteer's tasks have bare answers, so the default here is the last token; for open answers
there is the mean over the answer (readout="answer").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import READOUTS, Evidence
from austeer.methods.base import GridPoint, Method
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
    edits = "one layer's output, shifted"
    sites = ("layer",)
    foldable = False

    def __init__(self, readout: str = "last", norm: str = "own"):
        """Take options: norm="mean" gives the vectors of all layers the same length, their mean, so that a multiplier
        means the same everywhere. The authors do so across behaviours; here there is one, so layers are made alike."""
        if readout not in READOUTS or norm not in NORMS:
            raise AUSteerError(f"readout must be one of {', '.join(READOUTS)}, and norm one of {', '.join(NORMS)}")
        self.readout, self.norm = readout, norm

    def grid(self, kind: str) -> list[GridPoint]:
        return [{"depth": depth, "alpha": alpha} for alpha, depth in product(ALPHAS[kind], DEPTHS[kind])]

    def prepare(self, evidence: Evidence) -> Vectors:
        vectors = mean_difference(*evidence.activations(self.readout))
        if self.norm == "mean":
            vectors = match_norms(vectors)
        return Vectors(vectors, {**evidence.header(), "method": self.name})

    def plan(self, prepared: Vectors, point: GridPoint, draw: int = 0) -> Plan:
        if not 0 <= point["depth"] < 1:
            raise AUSteerError(f"depth is a share of the layers and must be from 0 to below 1, not {point['depth']}")
        layers = len(prepared.by_layer)
        layer = min(layers - 1, round(point["depth"] * layers))
        shift = torch.zeros_like(prepared.by_layer)
        shift[layer] = point["alpha"] * prepared.by_layer[layer]
        return Plan({}, {"layer": shift}, "last", {**prepared.header, **point, "layer": layer})


def mean_difference(right: Tensor, wrong: Tensor) -> Tensor:
    return (right.double() - wrong.double()).mean(0).float()


def match_norms(vectors: Tensor) -> Tensor:
    """Give all vectors their average length; zero stays zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors * (length.mean() / length), 0.0)


METHODS = (CAA(),)
