"""Steering, the method's second half: turn ranks, k and alpha into a plan.

    plan = set_MFU(ranks, k=16, alpha=2.0)         # or set_MFU(ranks, kl=0.01, fisher=fisher)
    with steer(model, plan):                       # always cleared on the way out
        model.generate(...)

    python set_MFU.py --ranks ranks.safetensors --k 16 --alpha 2 --out plan.safetensors
    python set_MFU.py --ranks ranks.safetensors --kl 0.01 --fisher fisher.safetensors --out plan.safetensors

Section 4.2 of the paper: the k AUs of highest score are scaled, x_i -> x_i + gamma_i x_i, with
gamma_i = alpha r+_i where r+_i > r-_i, and -alpha r-_i otherwise (r of equation 2, MFU_screening.py).
Every variant is a choice of where (LOCATIONS) and how strongly (STRENGTHS). Causal ranks can instead be given a budget:
what the plan may cost on neutral text, in nats per token (austeer/budget.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.budget import Budget
from austeer.errors import AUSteerError, run_command
from austeer.fisher import Fisher
from austeer.kl import KLMeter
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import Steering, apply, clear, steer

__all__ = ["LOCATIONS", "STRENGTHS", "Steering", "apply", "clear", "set_MFU", "steer"]

LOCATIONS = {
    "score": "the k highest scores (the paper)",
    "lowest": "the k lowest scores (suppression, Table 13)",
    "random": "k random AUs, each with its own strength (Random Loc., Table 3)",
    "difference": "the k largest mean activation differences (Act. Diff., Table 3; SADI's choice)",
}
STRENGTHS = {
    "adaptive": "gamma = alpha * signed share of pairs (the paper); causal ranks: alpha * direction",
    "fixed": "one strength for all AUs, signs kept (Fixed Strength, Table 3)",
    "sign-aware": "times the sign of the mean activation: pushes towards the positive side, not outwards",
    "flipped": "each sign by the toss of a coin: what an arbitrary change of basis does (control, docs/sign.md)",
    "vector": "add alpha * mean activation difference instead of scaling (Fixed Vec., Table 3)",
    "suppress": "x -> alpha * x with alpha below 1 (suppression, Table 13)",
}


@overload
def set_MFU(
    ranks: AURanks,
    k: int,
    alpha: float,
    *,
    location: str = "score",
    strength: str = "adaptive",
    tokens: str = "all",
    seed: int = 0,
) -> Plan: ...


@overload
def set_MFU(
    ranks: AURanks | Sequence[AURanks],
    k: int | None = None,
    *,
    kl: float,
    fisher: Fisher,
    model: PreTrainedModel | None = None,
    **options: float | str,
) -> Plan: ...


@overload
def set_MFU(  # the authors' call: set_MFU(*ranks, k, alpha, model, "ffn")
    ranks: Sequence[float],
    k: Sequence[int],
    alpha: Sequence[Sequence[int]],
    authors_k: float,
    authors_alpha: float,
    model: PreTrainedModel,
    applied_module: str,
    /,
) -> Plan: ...


def set_MFU(
    ranks: AURanks | Sequence[AURanks] | Sequence[float] | None = None,
    k: int | Sequence[int] | None = None,
    alpha: float | Sequence[Sequence[int]] | None = None,
    authors_k: float | None = None,
    authors_alpha: float | None = None,
    model: PreTrainedModel | None = None,
    applied_module: str | None = None,
    *,
    location: str = "score",
    strength: str = "adaptive",
    tokens: str = "all",
    seed: int = 0,
    kl: float | None = None,
    fisher: Fisher | None = None,
    all_scores: Sequence[float] | None = None,
    all_layer: Sequence[int] | None = None,
    all_indices: Sequence[Sequence[int]] | None = None,
    **budget_options: float | str,
) -> Plan:
    """Choose k AUs and give each its strength. `seed` draws the locations or the signs of random controls.

    kl: a budget in nats per token in place of alpha, for causal ranks of fitted temperature, those of several sites
    together if `ranks` is a list. It needs the model's Fisher information; k is chosen unless it is given. With `model`
    the plan is measured and corrected, and its cost reported on text that corrected nothing. Further options are those of austeer.budget.Budget.

    The authors' call, set_MFU(all_scores, all_layer, all_indices, k, alpha, model, applied_module), works too: it
    sets the plan on the model at once and replaces what was set at that site.
    """
    if all_scores is not None:
        return _authors_call(all_scores, all_layer, all_indices, k, alpha, model, applied_module)
    if kl is not None or fisher is not None:
        if kl is None or fisher is None or alpha is not None:
            raise AUSteerError("a budget needs kl and fisher, and no alpha: set_MFU(ranks, kl=0.01, fisher=fisher)")
        if (location, strength, tokens) != ("score", "adaptive", "all"):
            raise AUSteerError(
                "a budget itself says which AUs and how strongly: leave out location, strength and tokens"
            )
        pooled = [ranks] if isinstance(ranks, AURanks) else list(ranks)
        budget = Budget(pooled, fisher, **budget_options)
        if model is None:
            return budget.plan(kl, k)
        plan = budget.plan(kl, k, KLMeter(model, fisher.measure))
        plan.header["fresh_kl"] = KLMeter(model, fisher.report).with_error(plan)
        return plan
    if budget_options:
        raise AUSteerError(f"{', '.join(budget_options)}: only a budget has such options: give kl and fisher")
    if not isinstance(ranks, AURanks):
        return _authors_call(ranks, k, alpha, authors_k, authors_alpha, model, applied_module)
    n = int(ranks.exists.sum())
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise AUSteerError(f"k must be a whole number from 1 to {n} (the AUs at site {ranks.site}), not {k}")
    if not math.isfinite(alpha):
        raise AUSteerError(f"alpha must be a finite number, not {alpha}")
    order = _locate(ranks, location, seed)
    mask = torch.zeros(ranks.score.numel(), dtype=torch.bool)
    mask[order[ranks.exists.flatten()[order]][:k]] = True
    mask = mask.view(ranks.score.shape)
    header = ranks.origin() | {"k": k, "alpha": alpha, "location": location, "strength": strength}
    if location == "random" or strength == "flipped":
        header["seed"] = seed
    if strength == "vector":
        shift = _stat(ranks, "sum_momentum", "a fixed vector") / ranks.header["pairs"]
        return Plan({}, {ranks.site: torch.where(mask, alpha * shift.float(), 0.0)}, tokens, header)
    gamma = _gamma(ranks, alpha, strength, seed)
    return Plan({ranks.site: torch.where(mask, gamma, 0.0)}, {}, tokens, header)


def _locate(ranks: AURanks, location: str, seed: int) -> Tensor:
    """Return flat AU numbers, those to steer first."""
    if location == "score":
        return ranks.order
    if location == "lowest":
        return ranks.order.flip(0)
    if location == "random":
        return torch.randperm(ranks.score.numel(), generator=torch.Generator().manual_seed(seed))
    if location == "difference":
        size = _stat(ranks, "sum_momentum", "location by activation difference").flatten().abs()
        return torch.sort(size, descending=True, stable=True).indices
    raise AUSteerError(f"location {location!r} is unknown; use one of {', '.join(LOCATIONS)}")


def _gamma(ranks: AURanks, alpha: float, strength: str, seed: int) -> Tensor:
    if strength == "adaptive":
        return ranks.gain * alpha
    if strength == "fixed":
        return ranks.gain.sign() * alpha
    if strength == "sign-aware":
        return ranks.gain * alpha * _stat(ranks, "sum_activation", "sign-aware strength").sign().float()
    if strength == "flipped":
        coin = torch.randint(0, 2, ranks.gain.shape, generator=torch.Generator().manual_seed(seed))
        return ranks.gain * alpha * (2 * coin - 1)
    if strength == "suppress":
        if not 0 <= alpha < 1:
            raise AUSteerError(f"suppression multiplies by alpha, which must be from 0 to below 1, not {alpha}")
        return torch.full_like(ranks.gain, alpha - 1)
    raise AUSteerError(f"strength {strength!r} is unknown; use one of {', '.join(STRENGTHS)}")


def _stat(ranks: AURanks, name: str, purpose: str) -> Tensor:
    if name not in ranks.stats:
        raise AUSteerError(
            f"{purpose} needs {name}, which these ranks lack: rank again with momentum='activation', in this project"
        )
    return ranks.stats[name]


def _authors_call(
    all_scores: Sequence[float],
    all_layer: Sequence[int],
    all_indices: Sequence[Sequence[int]],
    k: float | None,
    alpha: float | None,
    model: PreTrainedModel | None,
    applied_module: str | None,
) -> Plan:
    """Do as their code does: write AUs one by one until k of them are not zero. So k <= 0 steers one AU, and 2.5 three."""
    if applied_module is None:
        raise AUSteerError(
            "call set_MFU(ranks, k, alpha) with AURanks, or, as the authors do, "
            "set_MFU(all_scores, all_layer, all_indices, k, alpha, model, applied_module)"
        )
    ranks = AURanks.from_lists(all_scores, all_layer, all_indices, site=applied_module)
    nonzero = int((ranks.score != 0).sum())
    plan = set_MFU(ranks, min(max(1, math.ceil(k)), max(nonzero, 1)), alpha)
    apply(model, plan)
    return plan


if __name__ == "__main__":
    from austeer.commands.plan import main

    run_command(main)
