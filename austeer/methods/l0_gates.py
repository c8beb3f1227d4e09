"""Gates trained to be few: HardConcrete gates with an L0 penalty, which choose k by themselves.

In the spirit of JoLA (Lai et al., "Joint Localization and Activation Editing", arXiv 2502.01179), which learns where
to edit and the edit together. They gate heads that are scaled and shifted; here a gate z_i sits on every AU, which is
scaled alone. z is a HardConcrete variable (Louizos et al., arXiv 1712.01312), u uniform, drawn anew for every batch:

    x_i -> x_i (1 + z_i g_i),     z = min(1, max(0, 1.2 sigmoid((log u - log(1 - u) + a) / beta) - 0.1)),     beta = 2/3
    loss = mean over pairs of -log sigmoid((M - offset) / tau) + l0 * mean over AUs of P(z_i > 0)

Adam trains a and g of all AUs together, from a = 2 and g = 0; tau and the offsets are fitted first. After training u is
left out: z = min(1, max(0, 1.2 sigmoid(a) - 0.1)), which is exactly 0 for most AUs. The plan scales the rest by alpha z g.
The search varies l0, with one training for each, and alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from austeer.evidence import Evidence
from austeer.forward import input_device, stack_layers
from austeer.methods.base import TOGETHER, GridPoint, Method, every_kind, header_of, sites_of
from austeer.methods.training import TemperedLoss, check_finite, descend, scaled
from austeer.plan import Plan
from austeer.tokens import EncodedPair
from rmodels import gates

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature of the gates, and how far they are stretched before they are clipped
OPEN = 2.0  # a at the start: nearly all gates are open
PENALTIES = every_kind(l0=(5.0, 1.5, 0.5))["l0"]  # nats, for all gates open
ALPHAS = {"small": (0.5, 1.0, 1.5, 2.0, 3.0), "full": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)}
PAIRS_PER_STEP = 8

Scales = dict[str, Tensor]  # z g by site, (layers, width)


class L0Gates(Method):
    name, label, trains = "l0-gates", "gates with an L0 penalty", True
    paper = "after Lai et al., arXiv 2502.01179"
    edits = "as many AUs as it keeps, scaled"
    sites = ("attention", "ffn", "layer", "neuron", *TOGETHER)
    axes = {"l0": PENALTIES, "alpha": ALPHAS}

    def __init__(self, rate: float = 0.02, gate_rate: float = 0.1, epochs: int = 4):
        self.rate, self.gate_rate, self.epochs = rate, gate_rate, epochs

    def prepare(self, evidence: Evidence) -> tuple[dict[float, Scales], dict]:
        loss = TemperedLoss(evidence)
        training = {"rate": self.rate, "gate_rate": self.gate_rate, "epochs": self.epochs, "seed": evidence.seed}
        header = header_of(evidence) | {"method": self.name} | training | loss.temperature.header()
        return {l0: self._train(evidence, loss, l0) for l0 in PENALTIES["small"]}, header

    def plan(self, prepared: tuple[dict[float, Scales], dict], point: GridPoint, draw: int = 0) -> Plan:
        by_penalty, header = prepared
        scales = {site: point["alpha"] * scale for site, scale in by_penalty[point["l0"]].items()}
        kept = sum(int((scale != 0).sum()) for scale in scales.values())
        return Plan(scales, header=header | point | {"k": kept})

    def _train(self, evidence: Evidence, loss: TemperedLoss, l0: float) -> Scales:
        model, sites, device = evidence.model, sites_of(evidence.site), input_device(evidence.model)
        places = [(gate.site, gate.layer, gate.width) for site in sites for gate in gates(model, site)]
        a = {(site, layer): torch.full((width,), OPEN, device=device) for site, layer, width in places}
        g = {(site, layer): torch.zeros(width, device=device) for site, layer, width in places}
        numbers = [values.requires_grad_() for values in (*a.values(), *g.values())]
        generator = torch.Generator().manual_seed(evidence.seed)

        def gated_loss(batch: Sequence[EncodedPair]) -> Tensor:
            scale = {place: sampled(a[place], generator) * g[place] for place in a}
            with scaled(model, sites, scale):
                return loss(batch)

        adam = torch.optim.Adam(
            [{"params": list(a.values()), "lr": self.gate_rate}, {"params": list(g.values()), "lr": self.rate}]
        )
        descend(
            evidence, adam, gated_loss, epochs=self.epochs, pairs_per_step=PAIRS_PER_STEP,
            penalty=lambda: l0 * torch.cat([chance_of_open(values) for values in a.values()]).mean(),
        )  # fmt: skip
        check_finite(evidence, numbers)
        rows = {place: (settled(a[place]) * g[place]).detach().float().cpu() for place in a}
        by_site = {site: {layer: row for (at, layer), row in rows.items() if at == site} for site in sites}
        return {site: stack_layers(by_layer, len(by_layer)) for site, by_layer in by_site.items()}


def sampled(a: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a HardConcrete gate for every a."""
    u = torch.rand(a.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(a)
    return _stretched(((u.log() - (1 - u).log() + a) / BETA).sigmoid())


def settled(a: Tensor) -> Tensor:
    """Return the gates as they are after training."""
    return _stretched(a.sigmoid())


def chance_of_open(a: Tensor) -> Tensor:
    """Return P(z > 0)."""
    return (a - BETA * math.log(-LOW / HIGH)).sigmoid()


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


METHODS = (L0Gates(),)
