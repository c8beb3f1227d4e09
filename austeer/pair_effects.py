"""The effect of every AU on every pair: what plans of a stated cost are made from.

c_ij = d log sigmoid(z_j) / d g_i with z_j = (M_j - offset_j) / tau, for all AUs of one or several sites side by side.
Ranks of fitted temperature keep dM_j / d g_i, and c follows from it by a factor per pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import logsigmoid

from austeer.balance import balanced
from austeer.errors import AUSteerError
from austeer.ranks import AURanks

FOLDS = 5


@dataclass(frozen=True)
class PairEffects:
    """Hold dM / dg, (pairs, AUs), of the AUs of all sites, and z, (pairs,), at g = 0."""

    gradients: Tensor
    z: Tensor
    tau: float
    groups: Tensor  # (pairs,) of int: pairs of one group stay in one fold
    answers: Tensor | None = None  # (pairs, 2) numbers of right and wrong answers, where effects are to be balanced

    @classmethod
    def of(cls, ranks: Sequence[AURanks]) -> PairEffects:
        first = ranks[0]
        for one in ranks:
            if "gradients" not in one.stats:
                raise AUSteerError(
                    "a plan of a stated cost needs the gradient of every pair, which these ranks lack: rank again with "
                    "momentum='causal' (--momentum causal), and a temperature that is fitted or not 1"
                )
            if one.header.get("pairs_hash") != first.header.get("pairs_hash") or len({r.site for r in ranks}) < len(
                ranks
            ):
                raise AUSteerError("ranks to be pooled must be of different sites, and made from the same pairs")
        gradients = [one.stats["gradients"][:, one.exists] for one in ranks]
        z = (first.stats["log_odds"] - first.stats["offsets"]) / first.header["tau"]
        together = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
        return cls(together, z, first.header["tau"], first.stats["groups"], first.stats.get("answers"))

    def __len__(self) -> int:
        return len(self.z)

    @property
    def slope(self) -> Tensor:
        """Return d log sigmoid(z) / dM of every pair: the weight that turns its gradient into its effects."""
        return torch.sigmoid(-self.z) / self.tau

    def only(self, pairs: Tensor) -> PairEffects:
        answers = None if self.answers is None else self.answers[pairs]
        return replace(
            self, gradients=self.gradients[pairs], z=self.z[pairs], groups=self.groups[pairs], answers=answers
        )

    def with_answers_swapped(self, seed: int) -> PairEffects:
        """Swap the answers of half of the groups: a control that has nothing to learn. tau stays that of the true pairs."""
        n_groups = int(self.groups.max()) + 1
        place = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
        sign = torch.where(place[self.groups] < n_groups // 2, -1.0, 1.0)
        answers = self.answers
        if answers is not None:  # what was wrong is right now
            answers = torch.where(sign[:, None] < 0, answers.flip(1), answers)
        return replace(
            self, gradients=self.gradients * sign[:, None].to(self.gradients), z=self.z * sign, answers=answers
        )

    def mean_and_error(self) -> tuple[Tensor, Tensor]:
        """Return the mean effect of every AU, balanced where that is wanted, and its standard error, float64.

        Groups are the units of the error, since pairs of one group are alike.
        """
        n, slope = len(self), self.slope
        n_groups, present = int(self.groups.max()) + 1, len(self.groups.unique())
        mean = torch.empty(self.gradients.shape[1], dtype=torch.float64)
        errors = torch.empty_like(mean)
        for columns in torch.arange(len(mean)).split(8192):  # in blocks: no float64 copy of everything
            effects = self.gradients[:, columns].double() * slope[:, None]
            if self.answers is not None:
                mean[columns], errors[columns] = balanced(effects, self.answers[:, 0])
                continue
            mean[columns] = effects.mean(0)
            sums = torch.zeros(n_groups, len(columns), dtype=torch.float64)
            sums.index_add_(0, self.groups, effects - mean[columns])
            errors[columns] = (sums.square().sum(0) * present / max(1, present - 1)).sqrt() / n
        return mean, errors

    def folds(self) -> list[Tensor]:
        """Return the pairs of each fold, (pairs,) of bool: groups in random order, dealt out like cards."""
        n_groups = int(self.groups.max()) + 1
        if n_groups < FOLDS:
            raise AUSteerError(f"cross-fitting needs at least {FOLDS} groups of pairs, not {n_groups}")
        order = torch.randperm(n_groups, generator=torch.Generator().manual_seed(0))
        fold_of = torch.empty(n_groups, dtype=torch.long)
        fold_of[order] = torch.arange(n_groups) % FOLDS
        return [fold_of[self.groups] == fold for fold in range(FOLDS)]

    def gains(self, aus: Tensor, gates: Tensor) -> Tensor:
        """Return the change of every pair's objective that first order predicts for gates (k,) at these AUs."""
        change = self.gradients[:, aus].double() @ gates.double()
        return logsigmoid(self.z + change / self.tau) - logsigmoid(self.z)

    def interval(self, gains: Tensor) -> tuple[float, float, float]:
        """Return the mean of the pairs' gains, and its 95 % t interval with groups as the units."""
        n_groups = int(self.groups.max()) + 1
        sizes = torch.zeros(n_groups, dtype=torch.float64).index_add(0, self.groups, torch.ones_like(gains))
        sums = torch.zeros(n_groups, dtype=torch.float64).index_add(0, self.groups, gains)
        present = sizes > 0
        sums, sizes, n = sums[present], sizes[present], int(present.sum())
        mean = float(gains.mean())
        residual = (sums - mean * sizes).square().sum() * n / max(1, n - 1)
        reach = float(student.ppf(0.975, max(1, n - 1))) * math.sqrt(float(residual)) / len(gains)
        return mean, mean - reach, mean + reach
