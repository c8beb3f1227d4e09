"""Where first order fails: AUs whose true change has another sign than predicted, or differs from it by more than a factor of 2.

The check spends forwards on a few ranking pairs: each of the plan's strongest AUs is scaled alone by its gate, from its
layer on. Prediction and truth are of the same pairs, so what differs between them is curvature and not the choice of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from austeer.objective import Gates, Objective
from austeer.truth import log_odds_of_changes

AU = tuple[str, int, int]  # site, layer, dim
FACTOR = 2.0


@dataclass(frozen=True)
class Check:
    """Hold for some AUs of a plan what first order predicts of their gates, and what they truly change, in nats."""

    aus: list[AU]
    predicted: Tensor
    true: Tensor
    forwards: float  # of the whole model, for one text: those that begin late count by the layers that they run

    @property
    def lies(self) -> Tensor:
        """Mark the AUs whose truth has another sign than predicted, or is off by more than FACTOR."""
        return first_order_lies(self.predicted, self.true)

    @property
    def ratio(self) -> Tensor:
        """Return truth over prediction, from 0 to FACTOR: how much of the slope at 0 is left at the gate."""
        return torch.where(self.predicted == 0, 1.0, self.true / self.predicted).clamp(0, FACTOR)


def first_order_lies(predicted: Tensor, true: Tensor) -> Tensor:
    ratio = true / predicted
    return ~((ratio >= 1 / FACTOR) & (ratio <= FACTOR))  # nan, where nothing is predicted, counts as a failure


def strongest(gates: Gates, gradient: Gates, top: int) -> list[AU]:
    """Return the AUs with the largest predicted changes, gate times gradient, largest first."""
    promised = [
        (-abs(float(values[layer, dim] * gradient[site][layer, dim])), site, layer, dim)
        for site, values in gates.items()
        for layer, dim in values.nonzero().tolist()
    ]
    return [(site, layer, dim) for _, site, layer, dim in sorted(promised)[:top]]


def check_first_order(objective: Objective, gates: Gates, aus: Sequence[AU]) -> Check:
    """Compare prediction and truth for these AUs at their gates, on the objective's pairs."""
    gradient = objective.gradient({site: values * 0 for site, values in gates.items()})
    doses = [float(gates[site][layer, dim]) for site, layer, dim in aus]
    slopes = [float(gradient[site][layer, dim]) for site, layer, dim in aus]
    true, forwards = torch.zeros(len(aus), dtype=torch.float64), 0.0
    for site, layer in sorted({au[:2] for au in aus}):
        here = [number for number, au in enumerate(aus) if au[:2] == (site, layer)]
        before, after = log_odds_of_changes(objective, site, layer, [(aus[i][2], doses[i]) for i in here])
        true[here] = (objective.of_log_odds(after) - objective.of_log_odds(before)).mean(1)
        layers = len(gates[site])
        forwards += 2 * len(objective) * (1 + (len(here) + 1) * (layers - layer) / layers)
    return Check(list(aus), torch.tensor(doses).double() * torch.tensor(slopes).double(), true, forwards)


def without_lies(gates: Gates, check: Check) -> Gates:
    """Return the gates without those of AUs whose first-order prediction fails."""
    reduced = {site: values.clone() for site, values in gates.items()}
    for (site, layer, dim), lies in zip(check.aus, check.lies.tolist(), strict=True):
        if lies:
            reduced[site][layer, dim] = 0.0
    return reduced
