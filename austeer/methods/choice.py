"""Choose the k best AUs or heads by score, and view activations at the attention site by head."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from austeer.errors import AUSteerError


def by_head(activations: Tensor, config: PretrainedConfig) -> Tensor:
    """View (..., heads * head_dim) as (..., heads, head_dim). That product is the site's width, not hidden_size."""
    heads, width = getattr(config.get_text_config(decoder=True), "num_attention_heads", 0), activations.shape[-1]
    if not heads or width % heads:
        raise AUSteerError(
            f"the {width} AUs at site attention of {config.model_type} are not those of {heads} attention heads; use a "
            "method that steers single AUs"
        )
    return activations.unflatten(-1, (heads, -1))


def highest(scores: Tensor, k: float, what: str) -> Tensor:
    """Mark the k highest of (layers, n) scores, as bool; ties go to the lower layer, then the lower number."""
    if isinstance(k, bool) or k != int(k) or not 1 <= k <= scores.numel():
        raise AUSteerError(f"{what} must be a whole number from 1 to {scores.numel()} (all of this model), not {k}")
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.sort(scores.flatten(), descending=True, stable=True).indices[: int(k)]] = True
    return mask.view(scores.shape)
