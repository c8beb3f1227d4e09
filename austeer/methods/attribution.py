"""Attribution patching: units, or heads, chosen by a first-order estimate of what a patch would do.

Nanda 2023; Syed et al., arXiv 2310.10348: replacing activations z by z' changes a measure M by about dM/dz (z' - z).
Here, for pair j, M is the log-odds of the right answer over the wrong one and the patch is the pair's own
difference d = x(right text) - x(wrong text) at the last token. The two texts share their prompt, whose end decides
the log-odds, and differ behind it, so the patch is made where steering acts, at all positions:

    a_ij = d_ij * sum over positions of dM_j / dx_i,     score_i = mean over pairs; of a head, the sum of its units

The k highest scores are shifted by alpha times their mean difference. Only positive ones: a shift the wrong way is
no candidate, so there may be fewer. `mediation.py` makes the patch of a head instead of estimating it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import log_odds_and_gradients
from austeer.identity import model_header
from austeer.methods.base import Method, Settings
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from austeer.tokens import EncodedPair

KS = {"small": (4, 16, 32), "full": (8, 32, 100)}
HEADS = {"small": (1, 2, 4), "full": (8, 24, 64)}
ALPHAS = {"small": (1.0, 2.0, 4.0, 8.0, 16.0), "full": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)}


@dataclass
class Scored:
    """What shifting a unit or a head towards the right texts does, and by how much it would be shifted."""

    score: Tensor  # (layers, units), or (layers, heads)
    shift: Tensor  # the mean difference, (layers, width)
    header: dict


class AttributionAUs(Method):
    name, label = "attribution", "AUs by attribution patching"
    paper = "Nanda 2023; Syed et al., arXiv 2310.10348"
    edits = "k AUs, shifted"
    sites = ("attention", "ffn", "layer", "neuron")
    count: ClassVar[str] = "k"  # the setting that says how many
    counts: ClassVar[dict[str, tuple[int, ...]]] = KS

    def grid(self, kind: str) -> list[Settings]:
        return [{self.count: k, "alpha": alpha} for k, alpha in product(self.counts[kind], ALPHAS[kind])]

    def prepare(self, evidence: Evidence) -> Scored:
        difference = torch.sub(*evidence.activations())
        return Scored(self.scores(evidence, difference), difference.mean(0), made_for(self, evidence))

    def scores(self, evidence: Evidence, difference: Tensor) -> Tensor:
        return (gradients(evidence) * difference).mean(0)

    def plan(self, prepared: Scored, settings: Settings, draw: int = 0) -> Plan:
        chosen = best(prepared.score, settings[self.count], prepared.shift.shape[1])
        shift = torch.where(chosen, settings["alpha"] * prepared.shift, 0.0)
        return Plan({}, {prepared.header["site"]: shift}, header=prepared.header | settings)


class AttributionHeads(AttributionAUs):
    name, label = "attribution-heads", "heads by attribution patching"
    edits = "k heads, shifted"
    sites = ("attention",)
    count, counts = "heads", HEADS  # not k: --k counts AUs

    def scores(self, evidence: Evidence, difference: Tensor) -> Tensor:
        return by_head(evidence.model, super().scores(evidence, difference)).sum(-1)


def made_for(method: Method, evidence: Evidence) -> dict:
    """A plan's header: whose it is, and what it was made from."""
    what = {"method": method.name, "site": evidence.site, "pairs_hash": pairs_hash(evidence.pairs)}
    return model_header(evidence.model) | what


def by_head(model: PreTrainedModel, values: Tensor) -> Tensor:
    """(..., width of site attention) -> (..., heads, head_dim)."""
    return values.unflatten(-1, (model.config.num_attention_heads, -1))


def best(score: Tensor, k: int, width: int) -> Tensor:
    """The units of the k highest positive scores, (layers, width) of bool; ties go to the lower layer, then unit."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= score.numel():
        raise AUSteerError(f"there are 1 to {score.numel()} units or heads to choose, not {k}")
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[torch.sort(score.flatten(), descending=True, stable=True).indices[:k]] = True
    chosen = chosen.view(score.shape) & (score > 0)
    return chosen.repeat_interleave(width // score.shape[1], 1)


def gradients(evidence: Evidence) -> Tensor:
    """Of every pair's log-odds with respect to a shift of every unit at all positions, (pairs, layers, width)."""

    def measure(batch: Sequence[EncodedPair]) -> Tensor:
        _, by_place = log_odds_and_gradients(evidence.model, [evidence.site], batch, torch.add)
        return torch.stack([by_place[place].float().cpu() for place in sorted(by_place)], dim=1)

    return evidence.of_each_pair(measure, "gradients")


METHODS = (AttributionAUs(), AttributionHeads())
