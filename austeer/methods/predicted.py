"""Causal AUSteer without a search: a first-order prediction gives k and alpha, and is then compared with what happens.

L = mean over pairs of log sigmoid(M) is at most 0. With c_i its slope along the gate of AU i (`MFU_screening.py`),
steering k AUs by alpha sign(c_i) is predicted to gain alpha * sum of |mean c_i|. So

    alpha = -L / (sum over the k AUs of |mean c_i|): the step at which the tangent reaches 0 (Polyak's step size)
    k     = the fewest AUs, best |t| first, for which alpha <= 1; if even all significant ones (`significance.py`, q)
            are too few for that, all of them with alpha = 1

The first order is trusted up to alpha = 1, where an AU is at most doubled or silenced and never inverted. Validation is
not used, and nothing is tried. Cost: the ranks and two forward passes over the pairs, the second only to measure:
`predicted` and `measured` in the plan's header are the change of L on the pairs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.functional import logsigmoid

from austeer.evidence import Evidence
from austeer.forward import PairTexts
from austeer.methods.austeer import Causal
from austeer.methods.base import GridPoint
from austeer.methods.significance import adjusted, significant, t_test
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from set_MFU import set_MFU

TRUSTED = 1.0  # the largest alpha


class CausalPredicted(Causal):
    name, label = "causal-predicted", "causal AUSteer, k and alpha predicted"
    paper = "ours: first order, no search"

    def __init__(self, q: float = 0.05):
        self.q = q

    def grid(self, kind: str) -> list[GridPoint]:
        return [{"q": self.q}]

    def prepare(self, evidence: Evidence) -> Plan:
        ranks, before = evidence.ranks(self.momentum), mean_log_sigmoid(evidence)
        k, alpha, gain = predict(ranks, before, self.q)
        if not k:
            nothing = {"q": self.q, "k": 0, "predicted": 0.0, "measured": 0.0}
            return Plan({ranks.site: torch.zeros_like(ranks.gain)}, header=ranks.origin() | nothing)
        plan = set_MFU(ranks, k, alpha)
        plan.header |= {"q": self.q, "predicted": gain, "measured": mean_log_sigmoid(evidence, plan) - before}
        return plan

    def plan(self, prepared: Plan, point: GridPoint, draw: int = 0) -> Plan:
        return prepared


def predict(ranks: AURanks, now: float, q: float) -> tuple[int, float, float]:
    """Return k, alpha and the gain that is predicted for them; now: L, unsteered."""
    pairs = ranks.header["pairs"]
    k = int(significant(adjusted(t_test(ranks.score, pairs)), q).sum())
    # the significant AUs come first, since p falls as |t| grows
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
    """Return L over all pairs. Pairs with equal answers count as 0: steering cannot move them."""
    total = 0.0
    with steer(evidence.model, plan) if plan is not None else nullcontext():
        for batch in evidence.batches():
            log_odds = PairTexts(evidence.model, batch, logits=True).log_odds()
            total += float(logsigmoid(log_odds.cpu().double()).sum())
    return total / len(evidence.pairs)


METHODS = (CausalPredicted(),)
