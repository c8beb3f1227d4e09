"""Structured pruning: remove whole attention heads and FFN channels, the same share of both in every block.

A group is what can be removed together: a key/value head with the query heads that read it (rows of q, k and v, columns
of o_proj), or a channel of the MLP (a row of gate_proj and up_proj, a column of down_proj). Its score is the root of the
sum of (|w| * ||x||)^2 over its columns of o_proj or down_proj: Wanda's score, added up over the group. For a single
channel that is exactly the norm of what it adds to the block's output over all calibration tokens.

Removed means zeroed: the model computes what it would without the groups, but keeps its shapes, and so its speed and
its gates. This is a simple criterion and not SlimGPT, which the RestoreLCC paper prunes with: SlimGPT corrects the
remaining weights as SparseGPT does, and removes more in later layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from austeer.errors import AUSteerError
from austeer.pruning.blocks import Block
from austeer.pruning.masks import Sparsity
from rmodels import decoder_layers

# the part of a block that is made of groups -> the Linears whose rows, and the one whose columns, belong to a group
PARTS = {"self_attn": (("q_proj", "k_proj", "v_proj"), "o_proj"), "mlp": (("gate_proj", "up_proj"), "down_proj")}


def remove_lowest(block: Block, config: PretrainedConfig, share: float) -> None:
    """Remove the groups with the lowest scores from a block, in place."""
    norms = {name.rpartition(".")[2]: norm for name, norm in block.norms().items()}
    for part, (inner, outer) in PARTS.items():
        owner = block.module.get_submodule(part)
        last = owner.get_submodule(outer)
        count = _groups(part, owner, config)
        contribution = last.weight.float().square().sum(0) * norms[outer].square()
        lowest = contribution.view(count, -1).sum(1).sort(stable=True).indices[: _number(count, share)]
        _remove(last.weight.T, count, lowest)
        for name in inner:
            linear = owner.get_submodule(name)
            _remove(linear.weight, count, lowest)
            if linear.bias is not None:
                _remove(linear.bias, count, lowest)


def check_share(sparsity: Sparsity) -> None:
    if isinstance(sparsity, tuple):
        raise AUSteerError(f"structured pruning removes a share of heads and channels, not {sparsity[0]}:{sparsity[1]}")


def check_structure(model: PreTrainedModel, sparsity: Sparsity) -> None:
    """Refuse a model that is not built of these groups, and a sparsity that removes none of them."""
    check_share(sparsity)
    for block in decoder_layers(model):
        for part, (inner, outer) in PARTS.items():
            for name in (*inner, outer):
                if not isinstance(getattr(getattr(block, part, None), name, None), nn.Linear):
                    raise AUSteerError(
                        f"structured pruning needs Linears {', '.join((*inner, outer))} in {part}, and "
                        f"{model.config.model_type} has no {name} there; prune by wanda, sparsegpt or magnitude"
                    )
    counts = [_groups(part, block.get_submodule(part), model.config) for part in PARTS]
    if not any(_number(count, sparsity) for count in counts):
        raise AUSteerError(f"{sparsity:g} of {counts[0]} heads or {counts[1]} channels is none: use a larger share")


def _groups(part: str, owner: nn.Module, config: PretrainedConfig) -> int:
    return config.num_key_value_heads if part == "self_attn" else owner.down_proj.in_features


def _number(count: int, share: float) -> int:
    return min(round(count * share), count - 1)  # a block without any head or channel would be another architecture


def _remove(rows: Tensor, count: int, groups: Tensor) -> None:
    """Zero the rows of these groups; rows are split evenly among the groups."""
    mask = torch.zeros(count, dtype=torch.bool, device=rows.device)
    mask[groups] = True
    rows[mask.repeat_interleave(len(rows) // count)] = 0
