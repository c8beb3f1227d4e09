"""Integrated gradients: the k AUs that contribute most when all AUs of a site are scaled together.

Sundararajan et al., arXiv 1703.01365, over gates; in the spirit of GrAInS, arXiv 2507.18043, which steers by integrated
gradients of how much a right answer is preferred to a wrong one, but over tokens. With M the log-odds of a pair and u a
gate that is the same for all AUs of the site,

    share_i = u * mean over s from 0 to 1 of dM/dg_i at gates s u, averaged over pairs

The shares add up to what the whole uniform gate changes of M. The k AUs with the largest shares per gate, in absolute
value, are scaled by 1 + alpha sign(share_i / u). As u goes to 0 this is the gradient itself.
"""

from __future__ import annotations

import torch

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.integrated import integrated_gradients
from austeer.methods.relp import Attribution, RelP
from austeer.objective import Objective
from rmodels import site_shape


class Integrated(RelP):
    name, label = "integrated", "AUs by integrated gradients"
    paper = "ours: after arXiv 1703.01365 and GrAInS, arXiv 2507.18043"

    def __init__(self, gate: float = 0.25, points: int = 4):
        if not gate or not -1 <= gate <= 1 or points < 1:
            raise AUSteerError(
                f"integrated.gate must be from -1 to 1 and not 0, and integrated.points at least 1, not {gate} and {points}"
            )
        self.gate, self.points = gate, points

    def prepare(self, evidence: Evidence) -> Attribution:
        objective = Objective(evidence.model, evidence.tokenizer, evidence.pairs, None)
        uniform = {evidence.site: torch.full(site_shape(evidence.model, evidence.site), self.gate)}
        found = integrated_gradients(objective, uniform, self.points)
        path = {"gate": self.gate, "points": self.points, "gain": found.gain, "shares_add_up_to": found.total}
        return Attribution(found.gradient[evidence.site].float(), evidence.header() | {"method": self.name} | path)


METHODS = (Integrated(),)
