"""RelP: the k AUs of most relevance for the right answer, by a gradient that follows RelP's rules.

Jafari et al., arXiv 2508.21258; at neurons, arXiv 2601.22594. With M the log-odds of a pair,

    relevance_i = mean over pairs of the sum over positions of x_i * dM/dx_i,

where the backward pass treats norms, attention probabilities and activation functions as constants (`austeer/relp.py`).
Without these rules this is the first order of causal momentum at an infinite temperature. The papers attribute and ablate;
that the k AUs of most relevance, in absolute value, are scaled by 1 + alpha sign(relevance) is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from austeer.evidence import Evidence
from austeer.methods.austeer import ALPHAS, KS
from austeer.methods.base import GridPoint, Method
from austeer.methods.choice import highest
from austeer.objective import Objective, no_gates
from austeer.plan import Plan
from austeer.relp import relp_rules


@dataclass
class Attribution:
    """Hold the signed score of every AU, (layers, width)."""

    score: Tensor
    header: dict


class RelP(Method):
    name, label = "relp", "AUs by relevance (RelP)"
    paper = "Jafari et al., arXiv 2508.21258; at neurons, arXiv 2601.22594"
    edits = "k AUs, scaled"
    sites = ("neuron", "attention", "ffn", "layer")
    axes = {"k": KS, "alpha": ALPHAS}

    def prepare(self, evidence: Evidence) -> Attribution:
        objective = Objective(evidence.model, evidence.tokenizer, evidence.pairs, None)
        with relp_rules(evidence.model):
            relevance = objective.gradient(no_gates(evidence.model, [evidence.site]))
        return Attribution(relevance[evidence.site].float(), evidence.header() | {"method": self.name})

    def plan(self, prepared: Attribution, point: GridPoint, draw: int = 0) -> Plan:
        mask = highest(prepared.score.abs(), point["k"], "k")
        scale = torch.where(mask, point["alpha"] * prepared.score.sign(), 0.0)
        return Plan({prepared.header["site"]: scale}, header=prepared.header | point)


METHODS = (RelP(),)
