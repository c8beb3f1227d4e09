"""Causal AUSteer with repeated ranking: a slope holds only near the point where it was taken, and steering moves away.

    Repeat: rank by |t_i| of c = d log sigmoid(M) / d g_i, with the AUs chosen so far at 1 + alpha sign t;
    add the best of the other AUs, up to 4, 16, 64, ... AUs in all

The path depends on alpha but not on k, which only cuts it. Cost: one pass of causal screening, and for each alpha
log4(k) - 1 more, rounded up (`passes` in the plan's header), made with the first plan of an alpha and not in `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from austeer.evidence import Evidence
from austeer.methods.austeer import ALPHAS, KS, Causal
from austeer.methods.base import GridPoint
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

# every alpha costs several passes over the pairs, so there are fewer than in AUSteer's grid
AXES = {
    "k": {"small": KS["small"], "full": (8, 32, 100)},
    "alpha": {"small": ALPHAS["small"], "full": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)},
}
GROWTH = 4  # the number of AUs after the first round, and the factor by which each later round multiplies it


@dataclass
class Path:
    """Hold flat AU numbers in the order they were chosen, with their directions."""

    aus: list[int] = field(default_factory=list)
    directions: list[float] = field(default_factory=list)

    def ranks(self, like: AURanks) -> AURanks:
        """Return the path as ranks: the earlier an AU was chosen, the higher its score; 0 for the others."""
        score, gain = torch.zeros(2, like.score.numel())
        gain[self.aus] = torch.tensor(self.directions)
        score[self.aus] = torch.arange(len(self.aus), 0, -1, dtype=torch.float32)
        shape = like.score.shape
        return AURanks(like.site, score.view(shape), gain.view(shape), header=like.header)


@dataclass
class Paths:
    evidence: Evidence
    ranks: AURanks  # ranks of the unsteered model
    paths: dict[float, Path] = field(default_factory=dict)  # by alpha


class CausalGreedy(Causal):
    name, label = "causal-greedy", "causal AUSteer, ranked again as it goes"
    paper = "ours: causal momentum at the steered point"
    axes = AXES

    def prepare(self, evidence: Evidence) -> Paths:
        return Paths(evidence, evidence.ranks(self.momentum))

    def plan(self, prepared: Paths, point: GridPoint, draw: int = 0) -> Plan:
        k, alpha = point["k"], point["alpha"]
        set_MFU(prepared.ranks, k, alpha)  # refuses an invalid k or alpha before the work
        path = prepared.paths.setdefault(alpha, Path())
        while len(path.aus) < k:
            self._extend(path, prepared, alpha)
        plan = set_MFU(path.ranks(prepared.ranks), k, alpha)
        plan.header["passes"] = 1 + sum(GROWTH**rounds < k for rounds in range(1, k.bit_length()))
        return plan

    def _extend(self, path: Path, prepared: Paths, alpha: float) -> None:
        ranks, evidence = prepared.ranks, prepared.evidence
        if path.aus:
            with steer(evidence.model, set_MFU(path.ranks(ranks), len(path.aus), alpha)):
                source = evidence.pairs, evidence.model, evidence.tokenizer, [evidence.site]
                ranks = screen(*source, momentum=self.momentum, progress=False)[evidence.site]
        steered = set(path.aus)
        count = (GROWTH - 1) * len(path.aus) or GROWTH
        best = [au for au in ranks.order.tolist() if au not in steered][:count]
        path.aus += best
        path.directions += ranks.gain.flatten()[best].tolist()


METHODS = (CausalGreedy(),)
