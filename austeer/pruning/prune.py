"""Prune a model in one of four ways, for methods that repair pruned models.

Every Linear of the decoder blocks is pruned in place; embeddings and LM head are not. Sparsity is a share of the
weights, or n:m, which is n zeros among every m neighbours of a row (GPUs speed up 2:4).

magnitude:  zeroes the smallest |w|, compared over the whole matrix.
wanda:      zeroes the smallest |w| * ||x||, compared within each row; ||x|| is the L2 norm of the weight's input feature
            over all calibration tokens (Sun et al., ICLR 2024).
sparsegpt:  zeroes weights one column after another and corrects the columns that follow (sparsegpt.py).
structured: removes whole heads and FFN channels (structured.py).

All but magnitude prune the blocks in order, and calibrate each on the output of the pruned blocks before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from austeer.errors import AUSteerError, one_of
from austeer.pruning.blocks import Block, linears_of, through_blocks
from austeer.pruning.masks import Sparsity, lowest
from austeer.pruning.sparsegpt import sparsegpt
from austeer.pruning.structured import check_structure, remove_lowest
from rmodels import decoder_layers, gates


@dataclass(frozen=True)
class ZeroCounts:
    """Count the weights that are exactly zero after pruning, by module and in total."""

    by_module: dict[str, tuple[int, int]]  # zeros, weights

    @property
    def zeros(self) -> int:
        return sum(zeros for zeros, _ in self.by_module.values())

    @property
    def weights(self) -> int:
        return sum(weights for _, weights in self.by_module.values())

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


def parse_sparsity(text: str) -> Sparsity:
    """Read a share such as "0.5", or a pattern such as "2:4"."""
    if pattern := re.fullmatch(r"(\d+):(\d+)", text):
        zeros, group = int(pattern[1]), int(pattern[2])
        if 0 < zeros < group:
            return zeros, group
    elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
        return float(text)
    raise AUSteerError(f"sparsity {text!r}: give a share above 0 and below 1, such as 0.5, or zeros:group, such as 2:4")


@torch.no_grad()
def prune(
    model: PreTrainedModel, how: str, sparsity: Sparsity, calibration: Sequence[Sequence[int]] = ()
) -> ZeroCounts:
    """Prune in place. calibration: texts as token ids, which all ways but magnitude need."""
    prune_block = one_of(PRUNINGS, how, "pruning")
    linears = {name: linear for block in linears_of(model) for name, linear in block.items()}
    _check(model, linears, how, sparsity)
    if how == "magnitude":
        for linear in linears.values():
            _zero(linear, linear.weight.abs().float(), sparsity, by_row=False)
    else:
        for block in through_blocks(model, calibration, how):
            prune_block(model, block, sparsity)
    return ZeroCounts({name: (int((one.weight == 0).sum()), one.weight.numel()) for name, one in linears.items()})


def _by_wanda(model: PreTrainedModel, block: Block, sparsity: Sparsity) -> None:
    norms = block.norms()
    for name, linear in block.linears.items():
        _zero(linear, linear.weight.abs().float() * norms[name], sparsity, by_row=True)


def _by_sparsegpt(model: PreTrainedModel, block: Block, sparsity: Sparsity) -> None:
    grams = block.grams()
    for name, linear in block.linears.items():
        linear.weight.copy_(sparsegpt(linear.weight, grams[name], sparsity))


def _by_structure(model: PreTrainedModel, block: Block, sparsity: Sparsity) -> None:
    remove_lowest(block, model.config, sparsity)


PRUNINGS = {"wanda": _by_wanda, "magnitude": None, "sparsegpt": _by_sparsegpt, "structured": _by_structure}


def _check(model: PreTrainedModel, linears: dict[str, nn.Linear], how: str, sparsity: Sparsity) -> None:
    """Refuse what could go wrong before the first weight is changed."""
    if any(not gate.idle for gate in gates(model)):
        raise AUSteerError("the model is steered; clear(model) before pruning it")
    quantised = [name for name, linear in linears.items() if not linear.weight.is_floating_point()]
    if quantised or getattr(model, "is_quantized", False):
        raise AUSteerError("a quantised model cannot be pruned; load it in bfloat16 or float32")
    if any(linear.weight.is_meta for linear in linears.values()):
        raise AUSteerError("some weights are not in memory; load the model without offloading to prune it")
    # most of such models would stay dense, and the reported share would hide it
    for name, module in decoder_layers(model).named_modules():
        if isinstance(module, Conv1D):
            raise AUSteerError(f"layers.{name} is a Conv1D; prune a model of Linear layers alone")
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() > 2 and not isinstance(module, nn.Conv1d):
                raise AUSteerError(
                    f"layers.{name}.{key} holds several experts in one tensor; prune a model of Linear layers alone"
                )
    if how == "structured":
        check_structure(model, sparsity)
    elif isinstance(sparsity, tuple):
        for name, linear in linears.items():
            if linear.in_features % sparsity[1]:
                raise AUSteerError(
                    f"{name} has {linear.in_features} inputs, not a multiple of {sparsity[1]}; use another pattern "
                    "or a share"
                )


def _zero(linear: nn.Linear, score: Tensor, sparsity: Sparsity, by_row: bool) -> None:
    linear.weight.masked_fill_(lowest(score, sparsity, by_row), 0)
