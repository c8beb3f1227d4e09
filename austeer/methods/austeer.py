"""AUSteer (sections 4.1 and 4.2), its sign-aware repair, causal momentum, and controls that use its ranks.

A variant is a momentum to rank by and options of `set_MFU`. The variants after the controls are ablations: where to
steer (`causal-location`), in which direction (`causal-sign`), how strongly (Table 3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from austeer.evidence import Evidence
from austeer.methods.base import GridPoint, Method
from austeer.plan import Plan
from austeer.ranks import AURanks
from MFU_screening import TEMPERED
from set_MFU import set_MFU

# The paper sweeps k and alpha from 1 to 100: the full grid has all settings of its Tables 8 and 9. Causal momentum also
# needs gentle steps. The embedded models have 512 AUs per site
KS = {"small": (4, 16, 32), "full": (2, 4, 8, 10, 16, 32, 50, 64, 80, 100)}
ALPHAS = {
    "small": (0.5, 1.0, 2.0, 4.0, 8.0),
    "full": (0.5, 1.0, 2.0, 5.0, 8.0, 10.0, 15.0, 16.0, 20.0, 32.0, 50.0, 100.0),
}
# Table 13: up to 99.95 % of the AUs, the least important ones, are multiplied by 0.99 to 0.05
SHARES = dict.fromkeys(("small", "full"), (0.25, 0.75, 0.9995))
FACTORS = {"small": (0.99, 0.9, 0.75, 0.5, 0.05), "full": (0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.05)}


class AUSteer(Method):
    name, label = "published", "AUSteer as published"
    paper = "AUSteer, ICLR 2026, sections 4.1 and 4.2"
    edits = "k AUs, scaled"
    sites = ("attention", "ffn", "layer", "neuron")
    momenta = ("activation",)
    axes = {"k": KS, "alpha": ALPHAS}
    options: ClassVar[dict] = {}

    def prepare(self, evidence: Evidence) -> AURanks:
        return evidence.ranks(self.momentum)

    def plan(self, prepared: AURanks, point: GridPoint, draw: int = 0) -> Plan:
        return set_MFU(prepared, point["k"], point["alpha"], **self.options, seed=draw)


class SignAware(AUSteer):
    name, label = "sign-aware", "AUSteer, sign-aware"
    paper = "ours: the strength follows the sign of the mean activation"
    options = {"strength": "sign-aware"}


class Causal(AUSteer):
    name, label = "causal", "causal AUSteer"
    paper = "ours: docs/sign.md"
    momenta = ("causal",)


class CausalFitted(Causal):
    """Rank by the objective whose temperature is fitted to the pairs, as the plans of a stated cost do."""

    name, label = "causal-fitted", "causal AUSteer, fitted temperature"
    paper = "ours: docs/budget.md"
    momenta = (TEMPERED,)


class RandomAUs(AUSteer):
    name, label, draws = "random", "random AUs", True
    paper = "control"
    options = {"location": "random"}


class FlippedAUs(AUSteer):
    name, label, draws = "flipped", "sign-flipped AUs", True
    paper = "control"
    options = {"strength": "flipped"}


class DifferenceAUs(AUSteer):
    name, label = "difference", "AUs by activation difference"
    paper = "AUSteer, Table 3: SADI's location with AUSteer's strength"
    options = {"location": "difference"}


class FixedStrength(AUSteer):
    name, label = "fixed-strength", "AUSteer, fixed strength"
    paper = "AUSteer, Table 3, Fixed Strength"
    options = {"strength": "fixed"}


class Suppress(AUSteer):
    """Scale the lowest scores, x_i -> factor * x_i, so that the important AUs weigh more."""

    name, label = "suppress", "least important AUs suppressed"
    paper = "AUSteer, Table 13"
    edits = "most AUs, damped"
    axes = {"share": SHARES, "factor": FACTORS}

    def plan(self, prepared: AURanks, point: GridPoint, draw: int = 0) -> Plan:
        k = max(1, int(point["share"] * prepared.score.numel()))
        return set_MFU(prepared, k, point["factor"], location="lowest", strength="suppress")


class CausalLocation(Causal):
    name, label = "causal-location", "located causally, published strength"
    paper = "ablation: where"
    momenta = ("causal", "activation")

    def prepare(self, evidence: Evidence) -> AURanks:
        return located(evidence, "causal", strength="activation")


class CausalSign(Causal):
    name, label = "causal-sign", "located as published, causal sign"
    paper = "ablation: which way"
    momenta = ("activation", "causal")

    def prepare(self, evidence: Evidence) -> AURanks:
        return located(evidence, "activation", strength="causal")


def located(evidence: Evidence, location: str, strength: str) -> AURanks:
    """Order AUs by one momentum, and take the gain that alpha multiplies from the other."""
    ranks = evidence.ranks(location)
    header = ranks.header | {"momentum": f"{location}, strength by {strength}"}
    return replace(ranks, gain=evidence.ranks(strength).gain, header=header)


ABLATIONS = (DifferenceAUs(), FixedStrength(), Suppress(), CausalLocation(), CausalSign())
METHODS = (RandomAUs(), FlippedAUs(), AUSteer(), SignAware(), Causal(), CausalFitted(), *ABLATIONS)
