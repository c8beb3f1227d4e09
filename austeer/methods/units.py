"""Heads at the attention site, and the choice of the k best units, a unit being a head or an AU."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from austeer.errors import AUSteerError


def by_head(activations: Tensor, config: PretrainedConfig) -> Tensor:
    """(..., heads * head_dim) -> (..., heads, head_dim); the site is as wide as that, not as hidden_size."""
    return activations.unflatten(-1, (config.num_attention_heads, -1))


def highest(scores: Tensor, k: float, what: str) -> Tensor:
    """Which k of (layers, units) score highest, as bool; of equal ones the lower layer, then the lower unit."""
    if isinstance(k, bool) or k != int(k) or not 1 <= k <= scores.numel():
        raise AUSteerError(f"{what} must be a whole number from 1 to {scores.numel()} (all of this model), not {k}")
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[torch.sort(scores.flatten(), descending=True, stable=True).indices[: int(k)]] = True
    return chosen.view(scores.shape)
