"""Causal AUSteer within a budget of KL, and two controls at the same cost (austeer/budget.py has the formulas).

    fisher          the AUs that gain most for what they cost on neutral text; the budget is the only strength
    random-at-kl    as many AUs as `fisher` begins with, at random, each at the same cost and with a random sign
    shuffled-pairs  `fisher` on pairs half of which have their answers swapped: what a method gains without anything to learn.
                    tau and the number of AUs to begin with are those of the true pairs

All are made for a stated KL, measured and corrected. Several sites share one budget: attention+neuron, or both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from austeer.balance import answer_numbers
from austeer.budget import ESTIMATES, RIDGE, Budget, Direction, Z
from austeer.errors import AUSteerError, one_of
from austeer.evidence import Evidence
from austeer.kl import KLMeter
from austeer.methods.base import TOGETHER, GridPoint, Method, every_kind, sites_of
from austeer.pair_effects import PairEffects
from austeer.plan import Plan
from MFU_screening import TEMPERED

KLS = (0.003, 0.01, 0.03, 0.1)  # nats per token


class Planner:
    """Hold what plans of any budget are made from, for our method and its controls, and the plans made so far."""

    def __init__(self, budget: Budget, meter: KLMeter, k: int | None):
        self.budget, self.meter, self.k = budget, meter, k
        self._ks: dict[float, int] = {}
        self.plans: dict[tuple[str, float, int], Plan] = {}  # by method, budget and draw

    def control(self, direction: Callable[[int], Direction], kl: float, seed: int) -> Plan:
        """Return a plan of as many AUs as ours has, or of more where so few cannot cost as much."""
        if kl not in self._ks:
            self._ks[kl] = self.budget.best_k(kl) if self.k is None else self.k
        return self.budget.reaching(direction, self._ks[kl], kl, self.meter, seed=seed)


class KLBudget(Method):
    name, label = "fisher", "causal, KL budget"
    paper = "ours: docs/budget.md"
    edits = "k AUs, scaled"
    sites = ("attention", "ffn", "layer", "neuron", *TOGETHER)
    momenta = (TEMPERED,)
    axes = {"kl": every_kind(kl=KLS)["kl"]}
    budgeted = True

    def __init__(
        self, k: int = 0, estimate: str = "discriminant", z: float = Z, ridge: float = RIDGE, balance: bool = False
    ):
        """Take options: k = 0 lets the budget choose k; z belongs to estimate "bound", ridge to "discriminant".

        balance: an AU counts only if it helps whichever answer is right (austeer/balance.py).
        """
        if k < 0:
            raise AUSteerError(f"k must be at least 1, or 0 to have it chosen, not {k}")
        one_of(ESTIMATES, estimate, "estimate")
        self.k, self.estimate, self.z, self.ridge, self.balance = k, estimate, z, ridge, balance

    def prepare(self, evidence: Evidence) -> Planner:
        sites = sites_of(evidence.site)
        ranks = [evidence.ranks(self.momentum, site) for site in sites]
        options = {"estimate": self.estimate, "z": self.z, "ridge": self.ridge}
        if self.balance:
            options["effects"] = replace(PairEffects.of(ranks), answers=answer_numbers(evidence.pairs))
        return Planner(Budget(ranks, evidence.costs.fisher(sites), **options), evidence.costs.meter(), self.k or None)

    def plan(self, prepared: Planner, point: GridPoint, draw: int = 0) -> Plan:
        made, which = prepared.plans, (self.name, point["kl"], draw)
        if which not in made:
            made[which] = self.within_budget(prepared, point["kl"], draw)
        return made[which]

    def within_budget(self, prepared: Planner, kl: float, draw: int) -> Plan:
        return prepared.budget.plan(kl, prepared.k, prepared.meter)


class RandomAtKL(KLBudget):
    name, label, draws = "random-at-kl", "random AUs, KL budget", True
    paper, learns_as = "control", KLBudget.name

    def within_budget(self, prepared: Planner, kl: float, draw: int) -> Plan:
        return prepared.control(lambda k: prepared.budget.random_direction(k, draw), kl, draw)


class ShuffledPairs(KLBudget):
    name, label, draws = "shuffled-pairs", "answers swapped at random, KL budget", True
    paper, learns_as = "control", KLBudget.name

    def within_budget(self, prepared: Planner, kl: float, draw: int) -> Plan:
        budget = prepared.budget
        gates = budget.gates(budget.effects.with_answers_swapped(draw))
        return prepared.control(lambda k: budget.strongest(gates, k), kl, draw)


METHODS = (KLBudget(), RandomAtKL(), ShuffledPairs())
