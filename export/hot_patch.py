"""Fold a plan into a live model, and take it out again bit for bit.

    with folded(model, plan):
        model.generate(...)        # no gate, no hook: the steered rows and columns are in the weights

They are written into the storage they have, so compiled code and captured CUDA graphs see them, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errors import AUSteerError
from export.weights import DIMENSIONS, Change, check_foldable, find_edits
from plan import Plan
from ranks import check_made_for


@contextmanager
def folded(model: PreTrainedModel, plan: Plan, *, check: bool = True) -> Iterator[PreTrainedModel]:
    """The plan in the weights inside a `with`; the old bits on the way out, whatever happens."""
    check_foldable(plan)
    shapes = {site: plan.shape(site) for site in plan.sites}
    check_made_for(model, shapes, plan.header if check else {"model": plan.header.get("model")}, "this plan was")
    weights = dict(model.named_parameters())
    changes = _changes(plan, weights)
    try:
        _write(weights, changes, "new")
        yield model
    finally:
        _write(weights, changes, "old")


@torch.no_grad()
def _changes(plan: Plan, weights: dict[str, Tensor]) -> list[Change]:
    if any(not weight.is_floating_point() for weight in weights.values()):
        raise AUSteerError("the model is quantised: a scaled row leaves its grid of numbers; steer it live")
    if any(weight.is_meta for weight in weights.values()):
        raise AUSteerError(
            "a part of the model is kept on disk or in other memory: its weights cannot be patched; steer it live"
        )
    edits = find_edits(plan, {name: tuple(weight.shape) for name, weight in weights.items()})
    return [change for edit in edits for change in edit.changes(weights[edit.weight], weights.get(edit.bias))]


@torch.no_grad()
def _write(weights: dict[str, Tensor], changes: list[Change], which: str) -> None:
    for change in changes:
        weights[change.tensor].index_copy_(DIMENSIONS[change.part], change.index, getattr(change, which))
