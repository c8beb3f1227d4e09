"""Integrated gradients along a plan: what each AU contributes on the way from no steering to the whole plan.

share_i = g_i * integral over s from 0 to 1 of dO/dg_i at gates s g. The shares add up to the plan's gain O(g) - O(0)
(completeness), however curved O is; the gradient at 0 alone promises this only for small doses. The integral is a
Gauss-Legendre sum: n points are exact for polynomials up to degree 2 n - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from austeer.objective import Gates, Objective

POINTS = 6


@dataclass(frozen=True)
class Integrated:
    """Hold the mean gradient along the way, for all AUs of the plan's sites, and the plan's shares and gain."""

    gradient: Gates
    shares: Gates
    gain: float

    @property
    def total(self) -> float:
        return float(sum(share.sum() for share in self.shares.values()))

    @property
    def gap(self) -> float:
        """Return by how much the shares miss the gain, relative to it: 0 is complete."""
        return abs(self.total - self.gain) / abs(self.gain)


def integrated_gradients(objective: Objective, gates: Gates, points: int = POINTS) -> Integrated:
    """Integrate dO/dg from no gates to these."""
    mean = {site: 0.0 for site in gates}
    for node, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        at = objective.gradient({site: values * (node + 1) / 2 for site, values in gates.items()})
        mean = {site: mean[site] + values * weight / 2 for site, values in at.items()}
    nothing = {site: values * 0 for site, values in gates.items()}
    shares = {site: mean[site] * gates[site].double() for site in gates}
    return Integrated(mean, shares, objective.value(gates) - objective.value(nothing))
