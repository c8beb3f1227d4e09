"""Causal AUSteer, ranked again as it goes: a slope is true where it was taken, and steering moves on.

    Repeat: rank by |t_i| of c = d log sigmoid(M) / d g_i, with those already steered at 1 + alpha sign t;
    steer the best of the others too, up to 4, 16, 64, ... AUs in all

The path depends on alpha and not on k, which cuts it. Cost: one pass of causal screening, and for each alpha log4(k) - 1
more, rounded up: `passes` in the plan's header. Those come with the first plan of an alpha, not with `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from austeer.evidence import Evidence
from austeer.methods.austeer import Causal
from austeer.methods.base import Settings
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

GROWTH = 4  # AUs in the first round, and how many times as many after every other


@dataclass
class Path:
    """Flat unit numbers in the order they were steered, and each one's direction."""

    units: list[int] = field(default_factory=list)
    directions: list[float] = field(default_factory=list)

    def ranks(self, like: AURanks) -> AURanks:
        """As ranks: the earlier steered, the higher the score; 0 for the others."""
        score, gain = torch.zeros(2, like.score.numel())
        gain[self.units] = torch.tensor(self.directions)
        score[self.units] = torch.arange(len(self.units), 0, -1, dtype=torch.float32)
        shape = like.score.shape
        return AURanks(like.site, score.view(shape), gain.view(shape), header=like.header)


@dataclass
class Greedy:
    evidence: Evidence
    ranks: AURanks  # of the unsteered model
    paths: dict[float, Path] = field(default_factory=dict)  # by alpha


class CausalGreedy(Causal):
    name, label = "causal-greedy", "causal AUSteer, ranked again as it goes"
    paper = "ours: causal momentum at the steered point"

    def prepare(self, evidence: Evidence) -> Greedy:
        return Greedy(evidence, evidence.ranks(self.momentum))

    def plan(self, prepared: Greedy, settings: Settings, draw: int = 0) -> Plan:
        k, alpha = settings["k"], settings["alpha"]
        set_MFU(prepared.ranks, k, alpha)  # refuses a k or alpha that makes no sense before the work
        path = prepared.paths.setdefault(alpha, Path())
        while len(path.units) < k:
            self._go_on(path, prepared, alpha)
        plan = set_MFU(path.ranks(prepared.ranks), k, alpha)
        plan.header["passes"] = 1 + sum(GROWTH**rounds < k for rounds in range(1, k.bit_length()))
        return plan

    def _go_on(self, path: Path, prepared: Greedy, alpha: float) -> None:
        ranks, evidence = prepared.ranks, prepared.evidence
        if path.units:
            with steer(evidence.model, set_MFU(path.ranks(ranks), len(path.units), alpha)):
                ranks = screen(
                    evidence.pairs,
                    evidence.model,
                    evidence.tokenizer,
                    [evidence.site],
                    momentum=self.momentum,
                    progress=False,
                )[evidence.site]
        steered = set(path.units)
        others = [unit for unit in ranks.order.tolist() if unit not in steered][
            : (GROWTH - 1) * len(path.units) or GROWTH
        ]
        path.units += others
        path.directions += ranks.gain.flatten()[others].tolist()


METHODS = (CausalGreedy(),)
