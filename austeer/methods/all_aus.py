"""Control: AUSteer's dynamic strength on every AU of a site (appendix J, Table 12, taken to the limit).

    x_i -> x_i + alpha r_i x_i for all i: what the method does when it chooses no AUs.

Only alpha is searched, as finely as the budget allows: steering all AUs calls for smaller strengths.
"""

from __future__ import annotations

from austeer.methods.austeer import AUSteer
from austeer.methods.base import BUDGET, GridPoint
from austeer.plan import Plan
from austeer.ranks import AURanks
from set_MFU import set_MFU

WEAKEST, STRONGEST = 0.01, 10.0


class AllAUs(AUSteer):
    name, label = "all-aus", "all AUs"
    paper = "control: AUSteer, appendix J and Table 12"
    edits = "all AUs, scaled"

    def grid(self, kind: str) -> list[GridPoint]:
        ratio = (STRONGEST / WEAKEST) ** (1 / (BUDGET[kind] - 1))
        return [{"alpha": float(f"{WEAKEST * ratio**i:.2g}")} for i in range(BUDGET[kind])]

    def plan(self, prepared: AURanks, point: GridPoint, draw: int = 0) -> Plan:
        return set_MFU(prepared, prepared.score.numel(), point["alpha"])


METHODS = (AllAUs(),)
