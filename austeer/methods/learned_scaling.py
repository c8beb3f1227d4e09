"""Activation scaling: one learned scalar per AU, a trained upper reference for causal momentum.

After Stoehr et al., "Activation Scaling for Steering and Interpreting Language Models", arXiv 2410.04962, whose
objective asks for effect (the right answer over the wrong one) and for few scalars (an L1 penalty). At a site:

    x_i -> x_i (1 + g_i) at all positions,     loss = mean over pairs of -log sigmoid(M_j(g)) + l1 * sum_i |g_i|

with M the log-odds of the pair, g = 0 at the start, and Adam. Causal momentum is the gradient of the first step of
this training. The k largest scalars are kept and multiplied by alpha. The paper differs: it scales whole activation
vectors at the positions of one prompt, and also asks that the probabilities of other tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from austeer.evidence import Evidence
from austeer.forward import PairTexts, input_device, stack_layers
from austeer.methods.base import GridPoint, Method
from austeer.methods.choice import highest
from austeer.methods.training import check_finite, descend, scaled
from austeer.plan import Plan
from austeer.tokens import EncodedPair
from rmodels import gates

KS = {"small": (4, 16, 32), "full": (8, 32, 100)}
ALPHAS = {"small": (0.5, 1.0, 1.5, 2.0, 3.0), "full": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)}
PAIRS_PER_STEP = 16


@dataclass
class Scalars:
    scale: Tensor  # g, (layers, width)
    header: dict


class LearnedScaling(Method):
    name, label, trains = "learned-scaling", "learned scaling", True
    paper = "after Stoehr et al., arXiv 2410.04962"
    edits = "k AUs, scaled"
    sites = ("attention", "ffn", "layer", "neuron")
    axes = {"k": KS, "alpha": ALPHAS}

    def __init__(self, l1: float = 0.001, rate: float = 0.02, epochs: int = 3):
        self.l1, self.rate, self.epochs = l1, rate, epochs

    def prepare(self, evidence: Evidence) -> Scalars:
        training = {"l1": self.l1, "rate": self.rate, "epochs": self.epochs, "seed": evidence.seed}
        header = evidence.header() | {"method": self.name} | training
        return Scalars(self._train(evidence), header)

    def plan(self, prepared: Scalars, point: GridPoint, draw: int = 0) -> Plan:
        mask = highest(prepared.scale.abs(), point["k"], "k")
        scale = torch.where(mask, point["alpha"] * prepared.scale, 0.0)
        return Plan({prepared.header["site"]: scale}, header=prepared.header | point)

    def _train(self, evidence: Evidence) -> Tensor:
        scale = {
            gate.layer: torch.zeros(gate.width, device=input_device(evidence.model), requires_grad=True)
            for gate in gates(evidence.model, evidence.site)
        }
        descend(
            evidence,
            torch.optim.Adam(scale.values(), lr=self.rate),
            lambda batch: loss(evidence, batch, scale),
            epochs=self.epochs,
            pairs_per_step=PAIRS_PER_STEP,
            penalty=lambda: self.l1 * sum(g.abs().sum() for g in scale.values()),
        )
        scalars = stack_layers({layer: row.detach().float().cpu() for layer, row in scale.items()}, len(scale))
        check_finite(evidence, [scalars])
        return scalars


def loss(evidence: Evidence, batch: Sequence[EncodedPair], scale: dict[int, Tensor]) -> Tensor:
    """Return the sum over pairs of -log sigmoid(log-odds), with activations scaled."""
    with scaled(evidence.model, [evidence.site], {(evidence.site, layer): g for layer, g in scale.items()}):
        return -functional.logsigmoid(PairTexts(evidence.model, batch, logits=True).log_odds()).sum()


METHODS = (LearnedScaling(),)
