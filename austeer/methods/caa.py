"""CAA: Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, ACL 2024, equation 1.

The mean difference of the residual stream between right and wrong answers, times a multiplier, is added to the output
of one layer, from the prompt's last token on. Three readouts say where the texts of a pair are read:

    last           the last token: the default, since most tasks have an option or a number as their whole answer
    before-last    the last token but one, as the authors do: the letter of an answer like "(A)"
    answer         the mean over the tokens that the two texts do not share, as STA's CAA does: for open answers. The
                   paper's tables read mawps, toxicity and bpo so

preset="original" tries every layer with the authors' multipliers; `depth` then counts layers, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import READOUTS, Evidence
from austeer.methods.base import GridPoint, Method, every_kind, is_original
from austeer.plan import Plan
from rmodels import site_shape

# depth: the layer as a share of all layers; 0.4 is the authors' layer 13 of 32. alpha: their multiplier
DEPTHS = {"small": (0.25, 0.5, 0.75), "full": (0.25, 0.4, 0.5, 0.6, 0.75)}
ALPHAS = {"small": (0.5, 1.0, 3.0, 10.0, 30.0), "full": (0.5, 1.0, 2.0, 3.0)}
THEIR_ALPHAS = (0.5, 1.0, 1.5, 2.0)  # those above zero: the authors also steer away
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
    axes = {"depth": DEPTHS, "alpha": ALPHAS}

    def __init__(self, readout: str = "last", norm: str = "own", preset: str | None = None, layers: int = 32):
        """Take options: norm="mean" gives the vectors of all layers the same length, their mean, so that a multiplier
        means the same everywhere. The authors do so across behaviours; here there is one, so layers are made alike.
        layers: how many the model has, for the preset's grid."""
        if readout not in READOUTS or norm not in NORMS:
            raise AUSteerError(f"readout must be one of {', '.join(READOUTS)}, and norm one of {', '.join(NORMS)}")
        self.readout, self.norm, self.preset, self.layers = readout, norm, preset, layers
        if is_original(preset):
            self.axes = every_kind(depth=range(layers), alpha=THEIR_ALPHAS)

    def grid(self, kind: str) -> list[GridPoint]:
        return sorted(super().grid(kind), key=lambda point: point["alpha"])  # gentlest first: no layer is gentler

    def prepare(self, evidence: Evidence) -> Vectors:
        if self.preset and (layers := site_shape(evidence.model, "layer")[0]) != self.layers:
            raise AUSteerError(
                f"this model has {layers} layers, not {self.layers}: add caa.layers={layers} to --option"
            )
        vectors = mean_difference(*evidence.activations(self.readout))
        if self.norm == "mean":
            vectors = match_norms(vectors)
        return Vectors(vectors, {**evidence.header(), "method": self.name})

    def plan(self, prepared: Vectors, point: GridPoint, draw: int = 0) -> Plan:
        layer = self.layer_at(point["depth"], len(prepared.by_layer))
        shift = torch.zeros_like(prepared.by_layer)
        shift[layer] = point["alpha"] * prepared.by_layer[layer]
        return Plan({}, {"layer": shift}, "last", {**prepared.header, **point, "layer": layer})

    def layer_at(self, depth: float, layers: int) -> int:
        if self.preset:
            return int(depth)
        if not 0 <= depth < 1:
            raise AUSteerError(f"depth is a share of the layers and must be from 0 to below 1, not {depth}")
        return min(layers - 1, round(depth * layers))


def mean_difference(right: Tensor, wrong: Tensor) -> Tensor:
    return (right.double() - wrong.double()).mean(0).float()


def match_norms(vectors: Tensor) -> Tensor:
    """Give all vectors their average length; zero stays zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors * (length.mean() / length), 0.0)


METHODS = (CAA(),)
