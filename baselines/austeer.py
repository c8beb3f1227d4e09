"""The rows that stand beside each other in every table here: AUSteer, its repair, causal momentum, controls.

A method is a momentum to rank by and options of `set_MFU`. All get the same pairs and the same search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from plan import Plan
from ranks import AURanks
from set_MFU import set_MFU


@dataclass(frozen=True)
class Method:
    label: str
    momentum: str
    options: dict = field(default_factory=dict)
    draws: bool = False  # a control: repeated with other seeds, shown as a band

    def plan(self, ranks: dict[str, AURanks], k: int, alpha: float, draw: int = 0) -> Plan:
        return set_MFU(ranks[self.momentum], k, alpha, **self.options, seed=draw)


METHODS = {
    "random": Method("random AUs", "activation", {"location": "random"}, draws=True),
    "flipped": Method("sign-flipped AUs", "activation", {"strength": "flipped"}, draws=True),
    "published": Method("AUSteer as published", "activation"),
    "sign-aware": Method("AUSteer, sign-aware", "activation", {"strength": "sign-aware"}),
    "causal": Method("causal AUSteer", "causal"),
}
