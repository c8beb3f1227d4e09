"""Causal AUSteer without a search: k and alpha from first order, and how far first order was off.

L = mean over pairs of log sigmoid(M) is at most 0. With c_i its slope along the gate of AU i (`austeer/momentum.py`),
steering k AUs by alpha sign(c_i) is predicted to gain alpha * sum of |mean c_i|. So

    alpha = -L / (sum over the k of |mean c_i|): the step at which the straight line reaches 0 (Polyak's step size)
    k     = the fewest AUs, best |t| first, for which alpha <= 1; all significant ones (`significance.py`, q) if even they
            need more, and then alpha = 1

alpha <= 1 is how far first order is trusted: an AU is at most doubled or silenced, never turned over. Validation is not
used, and nothing is tried. Cost: the ranks and two forward passes over the pairs, of which the second only measures:
`predicted` and `measured` in the plan's header are the change of L on the pairs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.functional import logsigmoid

from austeer.evidence import Evidence
from austeer.forward import PairTexts
from austeer.methods.austeer import Causal
from austeer.methods.base import Settings
from austeer.methods.significance import adjusted, origin, significant, t_test
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from set_MFU import set_MFU

TRUSTED = 1.0


class CausalPredicted(Causal):
    name, label = "causal-predicted", "causal AUSteer, k and alpha predicted"
    paper = "ours: first order, no search"

    def __init__(self, q: float = 0.05):
        self.q = q

    def grid(self, kind: str) -> list[Settings]:
        return [{"q": self.q}]

    def prepare(self, evidence: Evidence) -> Plan:
        ranks, before = evidence.ranks(self.momentum), mean_log_sigmoid(evidence)
        k, alpha, gain = predict(ranks, before, self.q)
        if not k:
            nothing = {"q": self.q, "k": 0, "predicted": 0.0, "measured": 0.0}
            return Plan({ranks.site: torch.zeros_like(ranks.gain)}, header=origin(ranks) | nothing)
        plan = set_MFU(ranks, k, alpha)
        plan.header |= {"q": self.q, "predicted": gain, "measured": mean_log_sigmoid(evidence, plan) - before}
        return plan

    def plan(self, prepared: Plan, settings: Settings, draw: int = 0) -> Plan:
        return prepared


def predict(ranks: AURanks, now: float, q: float) -> tuple[int, float, float]:
    """k, alpha, and the gain they are predicted to bring; now: L, unsteered."""
    pairs = ranks.header["pairs"]
    k = int(significant(adjusted(t_test(ranks.score, pairs)), q).sum())
    # significant ones come first: p falls as |t| grows
    slopes = (ranks.stats["sum"] / pairs).flatten()[ranks.order[:k]].abs().cumsum(0)
    enough = (slopes * TRUSTED >= -now).nonzero().flatten()
    if not k:
        return 0, 0.0, 0.0
    if not len(enough):
        return k, TRUSTED, TRUSTED * float(slopes[-1])
    fewest = int(enough[0])
    return fewest + 1, -now / float(slopes[fewest]), -now


@torch.no_grad()
def mean_log_sigmoid(evidence: Evidence, plan: Plan | None = None) -> float:
    """L over all pairs, those with equal answers at 0: steering cannot move them."""
    total = 0.0
    with steer(evidence.model, plan) if plan is not None else nullcontext():
        for batch in evidence.batches():
            log_odds = PairTexts(evidence.model, batch, logits=True).log_odds()
            total += float(logsigmoid(log_odds.double()).sum())
    return total / len(evidence.pairs)


METHODS = (CausalPredicted(),)
