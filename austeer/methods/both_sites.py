"""Causal AUSteer over attention and ffn together: one ranking, one k, one plan with two sites.

    AUs of both sites by |t_i| of c = d log sigmoid(M) / d g;     the k largest: x_i -> x_i (1 + alpha sign t_i)

t statistics over the same pairs can be compared across sites; shares of an activation's signs cannot.
"""

from __future__ import annotations

import torch

from austeer.evidence import Evidence
from austeer.methods.austeer import Causal
from austeer.methods.base import TOGETHER, GridPoint
from austeer.plan import Plan
from austeer.ranks import AURanks
from set_MFU import set_MFU


class CausalBoth(Causal):
    name, label = "causal-both", "causal AUSteer, one k for both sites"
    paper = "ours: causal momentum, two sites"
    sites = tuple(TOGETHER)

    def prepare(self, evidence: Evidence) -> dict[str, AURanks]:
        return {site: evidence.ranks(self.momentum, site) for site in TOGETHER[evidence.site]}

    def plan(self, prepared: dict[str, AURanks], point: GridPoint, draw: int = 0) -> Plan:
        by_site = list(prepared.values())
        score, gain = (
            torch.cat([getattr(ranks, name).flatten() for ranks in by_site])[None] for name in ("score", "gain")
        )
        joint = AURanks("both", score, gain, header=by_site[0].header)  # ties go to attention
        plan = set_MFU(joint, point["k"], point["alpha"])
        parts = plan.scales["both"].flatten().split([ranks.score.numel() for ranks in by_site])
        scales = {ranks.site: part.view(ranks.score.shape) for ranks, part in zip(by_site, parts, strict=True)}
        return Plan(scales, header=plan.header)


METHODS = (CausalBoth(),)
