"""Attribution patching: AUs, or heads, chosen by a first-order estimate of what a patch would do.

Nanda 2023; Syed et al., arXiv 2310.10348: replacing activations z by z' changes a measure M by about dM/dz (z' - z).
Here, for pair j, M is the log-odds of the right answer over the wrong one, and the patch is the pair's own
difference d = x(right text) - x(wrong text) at the last token. The end of the prompt decides the log-odds, and the two
texts differ only after it, so the patch is made where steering acts, at all positions:

    a_ij = d_ij * sum over positions of dM_j / dx_i,     score_i = mean over pairs

A head scores the sum of its AUs. The k highest scores are shifted by alpha times their mean difference, but only where
they are positive, since other shifts would lower M. `mediation.py` patches each head instead of estimating the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from austeer.evidence import Evidence
from austeer.forward import log_odds_and_gradients, stack_layers
from austeer.methods.base import GridPoint, Method
from austeer.methods.choice import by_head, highest
from austeer.plan import Plan
from austeer.tokens import EncodedPair
from rmodels import site_shape

KS = {"small": (4, 16, 32), "full": (8, 32, 100)}
HEADS = {"small": (1, 2, 4), "full": (8, 24, 64)}
ALPHAS = {"small": (1.0, 2.0, 4.0, 8.0, 16.0), "full": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)}


@dataclass
class Scores:
    """Hold the effect of shifting each AU or head towards the right texts, and the shift itself."""

    score: Tensor  # (layers, width), or (layers, heads)
    shift: Tensor  # the mean difference, (layers, width)
    header: dict


class AttributionAUs(Method):
    name, label = "attribution", "AUs by attribution patching"
    paper = "Nanda 2023; Syed et al., arXiv 2310.10348"
    edits = "k AUs, shifted"
    sites = ("attention", "ffn", "layer", "neuron")
    count: ClassVar[str] = "k"  # the key of a grid point that says how many
    axes = {"k": KS, "alpha": ALPHAS}

    def prepare(self, evidence: Evidence) -> Scores:
        difference = torch.sub(*evidence.activations())
        header = evidence.header() | {"method": self.name}
        return Scores(self.scores(evidence, difference), difference.mean(0), header)

    def scores(self, evidence: Evidence, difference: Tensor) -> Tensor:
        return (gradients(evidence) * difference).mean(0)

    def plan(self, prepared: Scores, point: GridPoint, draw: int = 0) -> Plan:
        score = prepared.score
        mask = highest(score, point[self.count], self.count) & (score > 0)
        mask = mask.repeat_interleave(
            prepared.shift.shape[1] // score.shape[1], 1
        )  # a head is shifted with all its AUs
        shift = torch.where(mask, point["alpha"] * prepared.shift, 0.0)
        return Plan({}, {prepared.header["site"]: shift}, header=prepared.header | point)


class AttributionHeads(AttributionAUs):
    name, label = "attribution-heads", "heads by attribution patching"
    edits = "k heads, shifted"
    sites = ("attention",)
    count, axes = "heads", {"heads": HEADS, "alpha": ALPHAS}  # not k: --k counts AUs

    def scores(self, evidence: Evidence, difference: Tensor) -> Tensor:
        return by_head(super().scores(evidence, difference), evidence.model.config).sum(-1)


def gradients(evidence: Evidence) -> Tensor:
    """Return dM / dshift of every pair, each AU shifted at all positions: (pairs, layers, width)."""

    def measure(batch: Sequence[EncodedPair]) -> Tensor:
        _, by_place = log_odds_and_gradients(evidence.model, [evidence.site], batch, torch.add)
        by_layer = {layer: rows.float().cpu() for (_, layer), rows in by_place.items()}
        return stack_layers(by_layer, site_shape(evidence.model, evidence.site)[0], dim=1)

    return evidence.per_pair(measure, "gradients")


METHODS = (AttributionAUs(), AttributionHeads())
