"""CNA, contrastive neuron attribution: the neurons that differ most between right and wrong texts, multiplied.

Herring, Naviasky and Malhotra, "Targeted Neuron Modulation via Contrastive Pair Search", arXiv 2605.12290. x is what
enters down_proj, read at the last token of each text:

    delta_i = mean x_i(right) - mean x_i(wrong);     the share of all neurons with the largest |delta|:     x_i -> m x_i

0.1 % of the neurons are chosen, over all layers together, whatever the sign of delta, and one m multiplies them all
at all positions: 0 ablates, more than 1 amplifies. A neuron that is always on is left out: one that is, in more than 80 %
of the texts, among that text's 0.1 % with the largest |x|.

Three things are ours. The authors contrast two sets of prompts, and here the two texts of a pair differ in the answer
alone. They find the neurons that are always on with prompts of any kind, and here the texts of the pairs serve, right and
wrong ones alike. The share is searched around theirs, because 0.1 % of an embedded model is a single neuron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from austeer.evidence import Evidence
from austeer.methods.base import GridPoint, Method
from austeer.methods.choice import highest
from austeer.plan import Plan
from rmodels import gates

SHARE = 0.001  # of all neurons
ALWAYS = 0.8  # in more than this share of the texts among the SHARE that are most active there
SHARES = {"small": (SHARE, 0.005, 0.02), "full": (0.0005, SHARE, 0.005)}
MULTIPLIERS = {"small": (0.5, 1.5, 0.0, 2.0, 4.0), "full": (0.75, 1.25, 0.5, 1.5, 0.0, 2.0, 4.0)}  # the gentlest first


@dataclass
class Contrast:
    delta: Tensor  # (layers, width)
    always_on: Tensor  # the same, bool
    neurons: int  # of the model: in some models layers are narrower than `width`
    header: dict


class CNA(Method):
    name, label = "cna", "CNA"
    paper = "Herring et al., arXiv 2605.12290"
    edits = "0.1 % of the neurons, scaled"
    sites = ("neuron",)
    axes = {"share": SHARES, "m": MULTIPLIERS}

    def prepare(self, evidence: Evidence) -> Contrast:
        right, wrong = evidence.activations()
        neurons = sum(gate.width for gate in gates(evidence.model, evidence.site))
        always_on = most_active(torch.cat([right, wrong]), counted(SHARE, neurons)).double().mean(0) > ALWAYS
        header = evidence.header() | {"method": self.name, "always_on": int(always_on.sum())}
        return Contrast((right - wrong).mean(0), always_on, neurons, header)

    def plan(self, prepared: Contrast, point: GridPoint, draw: int = 0) -> Plan:
        size = torch.where(prepared.always_on, 0.0, prepared.delta.abs())
        mask = highest(size, counted(point["share"], prepared.neurons), "neurons") & (size > 0)
        scale = torch.where(mask, point["m"] - 1, 0.0)
        return Plan({prepared.header["site"]: scale}, header=prepared.header | point)


def counted(share: float, neurons: int) -> int:
    """Return how many neurons a share of them is: at least one."""
    return max(1, round(share * neurons))


def most_active(texts: Tensor, count: int) -> Tensor:
    """Mark the neurons with the largest |x| in each text, of (texts, layers, width)."""
    flat = texts.abs().flatten(1)
    marks = torch.zeros_like(flat, dtype=torch.bool)
    return marks.scatter_(1, flat.topk(count).indices, True).view(texts.shape)


METHODS = (CNA(),)
