"""Make a plan of a stated cost: the most gain that a budget of KL on neutral text can buy, to first order.

With c the effects of gates on the objective of pairs (pair_effects.py) and F the Fisher information (fisher.py), a plan
that gains most within 1/2 sum_i F_i g_i^2 = budget has gates proportional to c_i / F_i. The effects are noisy, so they are
first made smaller, by one of two estimates:

bound         LCB_i = sign(c_i) max(|mean c_i| - z se_i, 0), a lower confidence bound;            g_i ~ LCB_i / F_i
discriminant  in Fisher units, x_ij = c_ij / sqrt(F_i) with mean m and covariance S over pairs:   g_i ~ w_i / sqrt(F_i)
              where (S + ridge t I) w = m, and t is the trace of S over the number of pairs: directions in which pairs
              disagree count less

Balanced effects (balance.py) take the place of the means, and AUs without one get no gate.

The k AUs with the largest F_i g_i^2 are steered, those of all sites together. Gates are cut off at `limit` and scaled until
the plan's price along its own direction is the budget; with a model, its KL is measured and corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from austeer.errors import AUSteerError, one_of
from austeer.fisher import Fisher
from austeer.kl import KLMeter
from austeer.pair_effects import PairEffects
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.secant import next_try

DAMPING = 0.01  # of the Fisher information, in means over its site: an AU that costs nothing would get any gate
Z = 1.0  # standard errors that the bound takes off
RIDGE = 3.0  # of the discriminant
LIMIT = 1.0  # the largest gate: an AU is at most doubled or silenced
FEWEST = 16  # AUs of the smallest plan that is tried
ENOUGH = 0.98  # k is the smallest that gains this share of the most ...
# ... of those with at most this share of their gates cut off, if there are any: first order ends at the limit
FEW_CUT = 0.1
CORRECTIONS = 3
CLOSE = 0.03  # a measured KL this near to the budget, as a share of it, needs no correction
MASSIVE = 1000.0  # an AU that costs this many medians of its site belongs to a massive activation


@dataclass(frozen=True)
class Direction:
    """Name the AUs of a plan among all AUs of the pooled sites, and give their gates up to a factor."""

    aus: Tensor  # (k,)
    gates: Tensor  # (k,) float64

    def scaled(self, factor: float, limit: float) -> Tensor:
        return (self.gates * factor).clamp(-limit, limit)


class Budget:
    """Hold what plans for one model, one set of pairs and any budget are made from."""

    def __init__(
        self,
        ranks: Sequence[AURanks],
        fisher: Fisher,
        *,
        estimate: str = "discriminant",
        z: float = Z,
        ridge: float = RIDGE,
        damping: float = DAMPING,
        limit: float = LIMIT,
        effects: PairEffects | None = None,
    ):
        """effects: those of the ranks, if not these (for controls)."""
        _check_fits(ranks, fisher)
        one_of(ESTIMATES, estimate, "estimate")
        self.ranks, self.fisher, self.limit = ranks, fisher, limit
        self.options = {"estimate": estimate, "damping": damping, "limit": limit}
        self.options |= {"z": z} if estimate == "bound" else {"ridge": ridge}
        self.effects = PairEffects.of(ranks) if effects is None else effects
        diagonals = [fisher.diagonal[one.site][one.exists].double() for one in ranks]
        self.usable = torch.cat([~one.lies[one.exists] for one in ranks])
        self.cost = torch.cat([diagonal + damping * diagonal.mean() for diagonal in diagonals])
        self.scores = torch.cat([fisher.scores[one.site][:, one.exists] for one in ranks], 1)

    @cached_property
    def own_gates(self) -> Tensor:
        """Hold the gates of all AUs, up to a factor, (AUs,)."""
        return self.gates(self.effects)

    @cached_property
    def _folds(self) -> list[tuple[Tensor, Tensor]]:
        """Hold each fold, (pairs,) of bool, and the gates that the pairs of the other folds give."""
        return [(fold, self.gates(self.effects.only(~fold))) for fold in self.effects.folds()]

    def gates(self, effects: PairEffects) -> Tensor:
        """Return gates up to a factor from these effects, (AUs,): none for an AU whose first order is known to fail."""
        return ESTIMATES[self.options["estimate"]](effects, self.cost, self.options) * self.usable

    def plan(self, kl: float, k: int | None = None, meter: KLMeter | None = None) -> Plan:
        """Make the plan for a budget of `kl` nats per token. meter: measures it and corrects its scale."""
        if isinstance(kl, bool) or not 0 < kl < math.inf:
            raise AUSteerError(f"the budget must be a positive number of nats per token, such as 0.01, not {kl}")
        if k is None:
            plan = self.reaching(lambda k: self.strongest(self.own_gates, k), self.best_k(kl), kl, meter)
        else:
            plan = self.plan_along(self.strongest(self.own_gates, self._checked(k)), kl, meter)
        plan.header["predicted_gain"] = [round(value, 6) for value in self.cross_fitted(kl, plan.header["k"])]
        return plan

    def reaching(
        self, direction: Callable[[int], Direction], k: int, kl: float, meter: KLMeter | None = None, **found
    ) -> Plan:
        """Make the plan of k AUs, or of twice as many until gates within their limit can cost `kl`."""
        while True:
            k = min(k, len(self.cost))
            chosen = direction(k)
            last = len(chosen.aus) < k or k == len(self.cost)  # there are no more
            if last or self._priced(chosen, kl)[1] > kl * (1 - CLOSE):
                plan = self.plan_along(chosen, kl, meter, **found)
                if last or "reached" not in plan.header:
                    return plan
            k *= 2

    def plan_along(self, direction: Direction, kl: float, meter: KLMeter | None = None, **found) -> Plan:
        """Make the plan of this direction that costs `kl`; found: more for its header."""
        gates, measured, first = self._to_budget(direction, kl, meter)
        predicted, error = self.fisher.price_with_error(self.scores[:, direction.aus].double() @ gates)
        clipped, cost = int((gates.abs() >= self.limit * (1 - 1e-9)).sum()), measured or predicted
        found |= {
            "kl": kl,
            "predicted_kl": predicted,
            "predicted_error": error,
            "measured_kl": measured,
            "k": len(gates),
            "clipped": clipped,
        }
        found |= {"measured_at_first": first} if meter else {}
        if left_out := int((~self.usable).sum()):
            found["left_out"] = left_out
        if clipped == len(gates) and cost < kl * (1 - CLOSE):
            found["reached"] = (
                f"a budget of {kl:g} is more than {clipped} gates of up to {self.limit:g} cost: {cost:.3g}"
            )
        return self._plan(direction.aus, gates, found | {"massive": self._massive(direction.aus)})

    def strongest(self, gates: Tensor, k: int) -> Direction:
        """Return the k AUs with the largest F_i g_i^2, with their gates."""
        worth = gates.square() * self.cost
        aus = torch.sort(worth, descending=True, stable=True).indices[:k]
        aus = aus[worth[aus] > 0]
        return Direction(aus, gates[aus])

    def random_direction(self, k: int, seed: int) -> Direction:
        """Return k random AUs with random signs, each at the same cost."""
        generator = torch.Generator().manual_seed(seed)
        usable = self.usable.nonzero().flatten()
        aus = usable[torch.randperm(len(usable), generator=generator)[: self._checked(k)]]
        signs = torch.randint(0, 2, (len(aus),), generator=generator).double() * 2 - 1
        return Direction(aus, signs / self.cost[aus].sqrt())

    def best_k(self, kl: float) -> int:
        """Return the fewest AUs whose cross-fitted gain is nearly the largest, of the ks that cut few gates off."""
        most = int((self.own_gates != 0).sum())
        if not most:
            raise AUSteerError("no effect is larger than its error: these pairs give nothing to steer by")
        ks = [FEWEST * 2**power for power in range(40) if FEWEST * 2**power < most] + [most]
        ks = [k for k in ks if self._share_cut(k, kl) <= FEW_CUT] or ks
        gains = {k: float(gain.mean()) for k, gain in self._cross_fitted(kl, ks).items()}
        best = max(gains.values())
        return next(
            k for k in ks if gains[k] >= min(best, ENOUGH * best)
        )  # of a loss, 98 % would be less than the best

    def _share_cut(self, k: int, kl: float) -> float:
        gates, _ = self._priced(self.strongest(self.own_gates, k), kl)
        return float((gates.abs() >= self.limit).double().mean())

    def cross_fitted(self, kl: float, k: int) -> tuple[float, float, float]:
        """Return the gain in nats of the objective that first order predicts on pairs a plan was not made from: mean, 95 % interval."""
        return self.effects.interval(self._cross_fitted(kl, [k])[k])

    def _cross_fitted(self, kl: float, ks: Sequence[int]) -> dict[int, Tensor]:
        """Return for each k every pair's gain under a plan from the pairs of the other folds, (pairs,)."""
        gains = {k: torch.zeros(len(self.effects), dtype=torch.float64) for k in ks}
        for fold, gates in self._folds:
            held = self.effects.only(fold)
            for k in ks:
                direction = self.strongest(gates, k)
                at_budget, _ = self._priced(direction, kl)
                gains[k][fold] = held.gains(direction.aus, at_budget)
        return gains

    def _checked(self, k: int) -> int:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self.cost):
            sites = ", ".join(one.site for one in self.ranks)
            raise AUSteerError(f"k must be a whole number from 1 to {len(self.cost)} (the AUs at {sites}), not {k}")
        return k

    def _priced(self, direction: Direction, kl: float) -> tuple[Tensor, float]:
        """Return the gates whose predicted KL is `kl`, or all at the limit where that costs less; and the KL predicted."""
        scores = self.scores[:, direction.aus].double()

        def price(factor: float) -> float:
            return self.fisher.price(scores @ direction.scaled(factor, self.limit))

        smallest = float(direction.gates.abs().min()) if len(direction.gates) else 1.0
        low, high = 0.0, self.limit / smallest  # there, all gates are at the limit
        if price(high) > kl:
            unclipped = self.limit / float(direction.gates.abs().max())
            guess = unclipped * math.sqrt(kl / max(price(unclipped), 1e-300))
            if guess <= unclipped:  # no gate is clipped: the price is a square
                return direction.scaled(guess, self.limit), price(guess)
            low = unclipped
            for _ in range(60):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if price(middle) < kl else (low, middle)
                if high / low < 1 + 1e-6:
                    break
        return direction.scaled(high, self.limit), price(high)

    def _to_budget(
        self, direction: Direction, kl: float, meter: KLMeter | None
    ) -> tuple[Tensor, float | None, float | None]:
        """Return gates, their measured KL, and what was measured before any correction."""
        gates, priced = self._priced(direction, kl)
        if meter is None:
            return gates, None, None
        tried = [(priced, meter(self._plan(direction.aus, gates, {})), gates)]
        for _ in range(CORRECTIONS):
            priced, measured, _ = tried[-1]
            if abs(measured / kl - 1) < CLOSE:
                break
            # what a plan costs beyond its prediction grows faster than the prediction does
            beyond = max(1.0, 3 - 2 * priced / measured)
            asked = next_try([(x, y) for x, y, _ in tried], kl, beyond)
            gates, again = self._priced(direction, asked)
            if measured < kl and again <= priced:  # all gates are at the limit
                break
            tried.append((again, meter(self._plan(direction.aus, gates, {})), gates))
        _, measured, gates = min(tried, key=lambda one: abs(math.log(one[1] / kl)))
        return gates, measured, tried[0][1]

    def _plan(self, aus: Tensor, gates: Tensor, found: dict) -> Plan:
        flat = torch.zeros(len(self.cost))
        flat[aus] = gates.float()
        scales, start = {}, 0
        for one in self.ranks:
            n = int(one.exists.sum())
            scales[one.site] = torch.zeros_like(one.score)
            scales[one.site][one.exists] = flat[start : start + n]
            start += n
        origin = {key: value for one in self.ranks for key, value in one.origin().items()}
        origin["site"] = "+".join(one.site for one in self.ranks)
        return Plan(scales, {}, "all", origin | self.options | found)

    def _massive(self, aus: Tensor) -> int:
        """Count the AUs of massive activations: those that cost far more than the median of their site."""
        count, start = 0, 0
        for one in self.ranks:
            n = int(one.exists.sum())
            here = aus[(aus >= start) & (aus < start + n)]
            count += int((self.cost[here] > MASSIVE * self.cost[start : start + n].median()).sum())
            start += n
        return count


def _bound(effects: PairEffects, cost: Tensor, options: dict) -> Tensor:
    mean, error = effects.mean_and_error()
    return mean.sign() * (mean.abs() - options["z"] * error).clamp(min=0) / cost


def _discriminant(effects: PairEffects, cost: Tensor, options: dict) -> Tensor:
    """Solve (S + ridge t I) w = m by Woodbury's identity over the pairs, of which there are fewer than AUs."""
    n, unit = len(effects), cost.rsqrt().float()
    x = effects.gradients.float() * unit
    x *= effects.slope.float()[:, None]
    if effects.answers is not None:
        balanced_mean = (effects.mean_and_error()[0] * unit).float()
        x *= balanced_mean != 0
    mean = x.mean(0)
    x -= mean
    gram = (x @ x.T).double()
    shrink = options["ridge"] * float(gram.trace()) / (n - 1) / n
    aim = mean if effects.answers is None else balanced_mean
    inner = torch.linalg.solve(gram + (n - 1) * shrink * torch.eye(n, dtype=torch.float64), (x @ aim).double())
    return ((aim - inner.float() @ x) / shrink * unit).double()


ESTIMATES = {"bound": _bound, "discriminant": _discriminant}


def _check_fits(ranks: Sequence[AURanks], fisher: Fisher) -> None:
    for one in ranks:
        if one.site not in fisher.sites:
            raise AUSteerError(
                f"the Fisher information was measured at {', '.join(fisher.sites)}, and these ranks are of {one.site}: "
                "measure it there, too"
            )
        ours, theirs = fisher.header.get("fingerprint"), one.header.get("fingerprint")
        if ours != theirs or fisher.diagonal[one.site].shape != one.score.shape:
            raise AUSteerError(
                f"the Fisher information is that of other weights ({fisher.header.get('model')}) than the ranks "
                f"({one.header.get('model')}): measure it on the model that was ranked"
            )
