"""How many AUs: as many as are significant, by Benjamini and Hochberg's control of false discoveries.

    published-fdr: a two-sided sign test of n+ against n-, the pairs with d > 0 and d < 0; pairs without a
        difference are left out
    causal-fdr: a two-sided t test of c over the pairs, N - 1 degrees of freedom
    steered are all AUs whose adjusted p is at most q, with the strengths of `published` and of `causal`

Instead of k, q is searched. Nothing significant: nothing is done. How many were is `k` in the plan's header. Many
pairs find even a small effect significant: this says which AUs differ at all, not how few would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from scipy.stats import binom, false_discovery_control, t
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.austeer import AUSteer, Causal
from austeer.methods.base import Settings
from austeer.plan import Plan
from austeer.ranks import AURanks

# q spans more than is usual: with 500 pairs, between 0.001 and 0.05 little changes. Weaker than with few AUs
QS = (1e-6, 1e-3, 0.05)
ALPHAS = {"small": (0.2, 0.5, 1.0, 2.0, 4.0), "full": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)}


@dataclass
class Tested:
    ranks: AURanks
    adjusted: Tensor  # p, adjusted for all AUs of the site, float64


class PublishedFDR(AUSteer):
    name, label = "published-fdr", "AUSteer, significant AUs"
    paper = "ours: the paper's counts, k by Benjamini-Hochberg"
    edits = "significant AUs, scaled"

    def grid(self, kind: str) -> list[Settings]:
        return [{"q": q, "alpha": alpha} for q, alpha in product(QS, ALPHAS[kind])]

    def prepare(self, evidence: Evidence) -> Tested:
        ranks = evidence.ranks(self.momentum)
        return Tested(ranks, adjusted(self.p_values(ranks)))

    def p_values(self, ranks: AURanks) -> Tensor:
        return sign_test(ranks.stats["positive"], ranks.stats["negative"])

    def plan(self, prepared: Tested, settings: Settings, draw: int = 0) -> Plan:
        ranks, found = prepared.ranks, significant(prepared.adjusted, settings["q"])
        header = origin(ranks) | settings | {"k": int(found.sum())}
        return Plan({ranks.site: torch.where(found, settings["alpha"] * ranks.gain, 0.0)}, header=header)


class CausalFDR(PublishedFDR):
    name, label = "causal-fdr", "causal AUSteer, significant AUs"
    paper = "ours: causal momentum, k by Benjamini-Hochberg"
    momenta = Causal.momenta

    def p_values(self, ranks: AURanks) -> Tensor:
        return t_test(ranks.score, ranks.header["pairs"])


def origin(ranks: AURanks) -> dict:
    """What a plan's header says of the ranks it is from."""
    kept = ("model", "family", "fingerprint", "precision", "momentum", "pairs_hash")
    return {key: ranks.header.get(key) for key in kept} | {"site": ranks.site}


def sign_test(positive: Tensor, negative: Tensor) -> Tensor:
    """Exact two-sided p that a pair is as likely positive as negative; 1 where no pair is either."""
    fewer, of = torch.minimum(positive, negative).numpy(), (positive + negative).numpy()
    return torch.from_numpy(2 * binom.cdf(fewer, of, 0.5)).clamp(max=1.0)


def t_test(score: Tensor, pairs: int) -> Tensor:
    """Two-sided p of a t statistic over so many pairs."""
    return torch.from_numpy(2 * t.sf(score.abs().double().numpy(), pairs - 1))


def adjusted(p: Tensor) -> Tensor:
    """Of all AUs with an adjusted p up to q, a share of q is expected to be there by chance."""
    return torch.from_numpy(false_discovery_control(p.flatten().numpy(), method="bh")).view(p.shape)


def significant(adjusted_p: Tensor, q: float) -> Tensor:
    if not 0 < q < 1:
        raise AUSteerError(f"q, the share of false discoveries allowed, is between 0 and 1, not {q}")
    return adjusted_p <= q


METHODS = (PublishedFDR(), CausalFDR())
