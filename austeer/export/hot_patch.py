"""Fold a plan into a live model, and take it out again bit for bit.

    with folded(model, plan):
        model.generate(...)        # no gate, no hook: the steered rows and columns are in the weights

The weights keep their storage, so compiled code and captured CUDA graphs see the change, too. Of quantised layers only
the outputs of 8-bit ones can be patched: LLM.int8 keeps one float scale per row, and scaling an output scales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.export.weights import DIMENSIONS, Change, Edit, Tally, check_foldable, find_edits
from austeer.identity import check_made_for
from austeer.plan import Plan

SCALES = ".scales"


@contextmanager
def folded(model: PreTrainedModel, plan: Plan, *, check: bool = True) -> Iterator[PreTrainedModel]:
    """Put the plan into the weights for the length of a `with`, and the old bits back on the way out, always."""
    check_foldable(plan)
    shapes = {site: plan.shape(site) for site in plan.sites}
    check_made_for(model, shapes, plan.header if check else {"model": plan.header.get("model")}, "this plan was")
    weights = _weights(model)
    changes = _changes(find_edits(plan, model), weights)
    try:
        _write(weights, changes, "new")
        yield model
    finally:
        _write(weights, changes, "old")


@torch.no_grad()
def _changes(edits: list[Edit], weights: dict[str, Tensor]) -> list[Change]:
    if any(weight.is_meta for weight in weights.values()):
        raise AUSteerError("part of the model is offloaded: its weights cannot be patched; steer it live")
    if any(not weight.is_floating_point() and name + SCALES not in weights for name, weight in weights.items()):
        raise AUSteerError("the model is quantised: a scaled row would leave the grid of its numbers; steer it live")
    changes = []
    for edit in edits:
        weight = weights[edit.weight]
        if weight.is_floating_point():
            changes += edit.changes(weight, weights.get(edit.bias))
        else:
            changes += _eight_bit_changes(edit, weight, weights[edit.weight + SCALES])
    tally = Tally()
    tally.count(changes)
    tally.check()
    return changes


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights by name; an 8-bit layer gives its int8 rows, and its row scales under a name of their own."""
    weights = dict(model.named_parameters())
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear8bitLt":  # by name, so that bitsandbytes may be missing
            if layer.state.SCB is None:
                layer.init_8bit_state()  # the first forward would do it, but none has run yet
            weights |= {f"{name}.weight": layer.state.CB, f"{name}.weight{SCALES}": layer.state.SCB}
    return weights


def _eight_bit_changes(edit: Edit, rows: Tensor, scales: Tensor) -> list[Change]:
    """Put the factor's size into the row's scale and its sign into the int8 numbers: exact but for one rounding."""
    if edit.moves_bias or "columns" in edit.parts():
        raise AUSteerError(
            f"the model is quantised: {edit.weight} has one scale per output, so only site ffn can be patched in "
            "(and only where there is no bias); steer it live"
        )
    index = edit.parts()["rows"].to(rows.device)
    factor = 1 + edit.out_scale.to(rows.device)[index]
    old_rows, old_scales = rows[index], scales[index]
    return [
        Change(edit.weight, "rows", index, old_rows, old_rows * factor.sign().to(rows.dtype)[:, None]),
        Change(edit.weight + SCALES, "columns", index, old_scales, old_scales * factor.abs(), is_whole=True),
    ]


@torch.no_grad()
def _write(weights: dict[str, Tensor], changes: list[Change], which: str) -> None:
    for change in changes:
        weights[change.tensor].index_copy_(DIMENSIONS[change.part], change.index, getattr(change, which))
