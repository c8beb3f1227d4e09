"""Steer as many AUs as are significant, by Benjamini and Hochberg's control of false discoveries.

    published-fdr: a two-sided sign test of n+ against n-, the pairs with d > 0 and d < 0; pairs without a
        difference are left out
    causal-fdr: a two-sided t test of c over the pairs, N - 1 degrees of freedom

All AUs whose adjusted p is at most q are steered, with the strengths of `published` and of `causal`. The search varies
q instead of k; the plan's header has the resulting number as `k`, and where it is 0 nothing is steered. With many pairs
even small effects are significant: the test says which AUs differ at all, not how few would do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binom, false_discovery_control, t
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.austeer import AUSteer, Causal
from austeer.methods.base import GridPoint
from austeer.plan import Plan
from austeer.ranks import AURanks

# q spans more than is usual, since with 500 pairs little changes between 0.001 and 0.05. Many AUs need smaller alphas
QS = dict.fromkeys(("small", "full"), (1e-6, 1e-3, 0.05))
ALPHAS = {"small": (0.2, 0.5, 1.0, 2.0, 4.0), "full": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)}


@dataclass
class PValues:
    ranks: AURanks
    adjusted: Tensor  # for all AUs of the site, float64


class PublishedFDR(AUSteer):
    name, label = "published-fdr", "AUSteer, significant AUs"
    paper = "ours: the paper's counts, k by Benjamini-Hochberg"
    edits = "significant AUs, scaled"
    axes = {"q": QS, "alpha": ALPHAS}

    def prepare(self, evidence: Evidence) -> PValues:
        ranks = evidence.ranks(self.momentum)
        return PValues(ranks, adjusted(self.p_values(ranks)))

    def p_values(self, ranks: AURanks) -> Tensor:
        return sign_test(ranks.stats["positive"], ranks.stats["negative"])

    def plan(self, prepared: PValues, point: GridPoint, draw: int = 0) -> Plan:
        ranks, mask = prepared.ranks, significant(prepared.adjusted, point["q"])
        header = ranks.origin() | point | {"k": int(mask.sum())}
        return Plan({ranks.site: torch.where(mask, point["alpha"] * ranks.gain, 0.0)}, header=header)


class CausalFDR(PublishedFDR):
    name, label = "causal-fdr", "causal AUSteer, significant AUs"
    paper = "ours: causal momentum, k by Benjamini-Hochberg"
    momenta = Causal.momenta

    def p_values(self, ranks: AURanks) -> Tensor:
        return t_test(ranks.score, ranks.header["pairs"])


def sign_test(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the exact two-sided p of "positive and negative pairs are equally likely"; 1 where there are neither."""
    fewer, n = torch.minimum(positive, negative).numpy(), (positive + negative).numpy()
    return torch.from_numpy(2 * binom.cdf(fewer, n, 0.5)).clamp(max=1.0)


def t_test(score: Tensor, pairs: int) -> Tensor:
    """Return the two-sided p of a t statistic over this many pairs."""
    return torch.from_numpy(2 * t.sf(score.abs().double().numpy(), pairs - 1))


def adjusted(p: Tensor) -> Tensor:
    """Adjust p so that, of all AUs with an adjusted p up to q, a share of at most q is expected by chance."""
    return torch.from_numpy(false_discovery_control(p.flatten().numpy(), method="bh")).view(p.shape)


def significant(adjusted_p: Tensor, q: float) -> Tensor:
    if not 0 < q < 1:
        raise AUSteerError(f"q, the allowed share of false discoveries, must be between 0 and 1, not {q}")
    return adjusted_p <= q


METHODS = (PublishedFDR(), CausalFDR())
