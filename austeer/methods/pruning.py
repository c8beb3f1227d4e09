"""Pruning by magnitude or by Wanda (Sun et al., ICLR 2024), for methods that repair a pruned model.

Every Linear of the decoder blocks is pruned in place; embeddings and LM head are not. Sparsity is a share of the
weights, or n:m, which is n zeros among every m neighbours of a row (GPUs speed up 2:4).

magnitude: zeroes the smallest |w|, compared over the whole matrix.
wanda:     zeroes the smallest |w| * ||x||, compared within each row; ||x|| is the L2 norm of the weight's input feature
           over all calibration tokens. As its authors do, blocks are pruned in order, and each is calibrated on the
           output of the pruned blocks before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.batching import grouped
from austeer.errors import AUSteerError
from austeer.forward import float64_device, input_device
from rmodels import gates

PRUNINGS = ("wanda", "magnitude")
TOKENS_AT_ONCE = 8192

Sparsity = float | tuple[int, int]  # a share of the weights, or (n, m): n zeros of every m


@dataclass(frozen=True)
class ZeroCounts:
    """Count the exact zeros among the pruned weights, by module and in all."""

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
    """Prune in place. calibration: texts as token ids, which Wanda needs."""
    if how not in PRUNINGS:
        raise AUSteerError(f"pruning {how!r} is unknown; use one of {', '.join(PRUNINGS)}")
    blocks = model.base_model.layers
    linears = [_linears(block, f"layers.{index}") for index, block in enumerate(blocks)]
    _check(model, linears, sparsity)
    if how == "magnitude":
        for linear in (linear for block in linears for linear in block.values()):
            _zero(linear, linear.weight.abs().float(), sparsity, by_row=False)
    else:
        calibration = [ids for ids in calibration if ids]
        if not calibration:
            raise AUSteerError("Wanda needs calibration texts; give some, or prune by magnitude")
        batches = same_length_batches(calibration)
        texts = [_Inputs.catch(model, [calibration[index] for index in batch]) for batch in batches]
        for index, block in enumerate(blocks):
            norms = _input_norms(block, linears[index], texts, index)
            for name, linear in linears[index].items():
                _zero(linear, linear.weight.abs().float() * norms[name], sparsity, by_row=True)
            for text in texts:
                text.hidden = text.run(block, index)
    counts = {name: linear for block in linears for name, linear in block.items()}
    return ZeroCounts({name: (int((one.weight == 0).sum()), one.weight.numel()) for name, one in counts.items()})


def same_length_batches(texts: Sequence[Sequence[int]], tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Group the indices of texts of equal length. They need no padding, which would count in a sum or a norm."""

    def fits(batch: list[int]) -> bool:
        first, last = len(texts[batch[0]]), len(texts[batch[-1]])
        return first == last and len(batch) * last <= tokens

    return grouped(sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True), fits)


def _linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    return {f"{prefix}.{name}": part for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def _check(model: PreTrainedModel, linears: list[dict[str, nn.Linear]], sparsity: Sparsity) -> None:
    """Refuse what could go wrong before the first weight is changed."""
    if any(not gate.idle for gate in gates(model)):
        raise AUSteerError("the model is steered; clear(model) before pruning it")
    everything = {name: linear for block in linears for name, linear in block.items()}
    quantised = [name for name, linear in everything.items() if not linear.weight.is_floating_point()]
    if quantised or getattr(model, "is_quantized", False):
        raise AUSteerError("a quantised model cannot be pruned; load it in bfloat16 or float32")
    if any(linear.weight.is_meta for linear in everything.values()):
        raise AUSteerError("some weights are not in memory; load the model without offloading to prune it")
    in_linears = {id(linear.weight) for linear in everything.values()}
    fused = [name for name, w in model.base_model.layers.named_parameters() if w.dim() > 2 and id(w) not in in_linears]
    if fused:  # most of such a model would stay dense, and the reported share would hide it
        raise AUSteerError(f"{fused[0]} holds several experts in one tensor; prune a model of Linear layers alone")
    if isinstance(sparsity, tuple):
        for name, linear in everything.items():
            if linear.in_features % sparsity[1]:
                raise AUSteerError(
                    f"{name} has {linear.in_features} inputs, not a multiple of {sparsity[1]}; use another pattern "
                    "or a share"
                )


def _zero(linear: nn.Linear, score: Tensor, sparsity: Sparsity, by_row: bool) -> None:
    """Zero the weights of the lowest scores; among ties the first ones, so that the count is exact."""
    if isinstance(sparsity, tuple):
        groups, count = score.view(-1, sparsity[1]), sparsity[0]
    else:
        groups = score if by_row else score.view(1, -1)
        count = int(groups.shape[1] * sparsity)
    lowest = groups.sort(dim=1, stable=True).indices[:, :count]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True)
    linear.weight.masked_fill_(mask.view_as(score), 0)


class _Inputs:
    """Hold one batch on its way through the blocks: its hidden states, and each block's other arguments."""

    def __init__(self, hidden: Tensor, arguments: list[dict]):
        self.hidden, self.arguments = hidden, arguments

    @classmethod
    def catch(cls, model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> _Inputs:
        """Run the dense model once, to see how its own forward calls each block (masks differ between blocks)."""
        hidden: list[Tensor] = []
        arguments: list[dict] = []

        def record(block, args, kwargs):
            hidden.append(args[0]) if not hidden else None
            arguments.append(kwargs)

        with ExitStack() as undo:
            for block in model.base_model.layers:
                undo.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
            model.base_model(input_ids=torch.tensor(batch, device=input_device(model)), use_cache=False)
        return cls(hidden[0], arguments)

    def run(self, block: nn.Module, index: int) -> Tensor:
        out = block(self.hidden, **self.arguments[index])
        return out[0] if isinstance(out, tuple) else out


def _input_norms(
    block: nn.Module, linears: dict[str, nn.Linear], texts: list[_Inputs], index: int
) -> dict[str, Tensor]:
    """Return ||x|| of every input feature of every Linear of a block, over all tokens; no activation is kept."""
    squares = {
        name: torch.zeros(linear.in_features, dtype=torch.float64, device=float64_device(linear.weight.device))
        for name, linear in linears.items()
    }

    def add(name):
        def hook(linear, args):
            squares[name] += args[0].to(squares[name].device).double().square().flatten(0, -2).sum(0)

        return hook

    with ExitStack() as undo:
        for name, linear in linears.items():
            undo.callback(linear.register_forward_pre_hook(add(name)).remove)
        for text in texts:
            text.run(block, index)
    if not all(torch.isfinite(total).all() for total in squares.values()):
        raise AUSteerError("activations are inf or nan on the calibration texts; load the model in bfloat16 or float32")
    return {name: total.sqrt().float().to(linears[name].weight.device) for name, total in squares.items()}
