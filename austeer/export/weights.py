"""Find the weights that a plan changes, and compute what they become. Folding, patching and adapters all start here.

A site is the input or output of a linear map y = W x + c, so a plan's x -> x * (1 + s) + b goes into W and c exactly:

    attention  input of o_proj      W (x (1 + s) + b) + c    =  [W (1 + s)] x + (c + W b)         columns of W
    neuron     input of down_proj   the same
    ffn        output of down_proj  (W x + c) (1 + s) + b    =  [(1 + s) W] x + (c (1 + s) + b)   rows of W

The output of a mixture of experts is a weighted sum over them: its rows are those of every expert, and of a
shared one. Gemma-2 is no exception: its norm comes after the ffn site. Weights have the same names in a checkpoint
and in a live model, except that a checkpoint may hold experts one by one or fused into 3-D tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.plan import Plan

PROJECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(self_attn\.o_proj|mlp\.(?:.+\.)?down_proj)(?:\.weight)?$")
DIMENSIONS = {"rows": -2, "columns": -1}  # axes of a weight, also of fused experts; a bias has only "columns"


@dataclass(frozen=True)
class Change:
    """Hold rows or columns of a tensor, as they were and as they become."""

    tensor: str
    part: str  # a key of DIMENSIONS
    index: Tensor
    old: Tensor
    new: Tensor

    def unchanged(self) -> list[int]:
        """Return the indices that rounding leaves as they were, bit for bit. A bias counts as a whole: parts of it may stay."""
        if self.old.dim() == 1:
            return [] if not torch.equal(self.new, self.old) else self.index.tolist()
        same = (self.new == self.old).movedim(DIMENSIONS[self.part], 0).flatten(1).all(1)
        return self.index[same].tolist()


@dataclass(frozen=True)
class Edit:
    """Say what a plan does to one linear map: scales and shifts of its inputs and of its outputs, float32."""

    weight: str
    bias: str | None
    in_scale: Tensor
    in_shift: Tensor
    out_scale: Tensor
    out_shift: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Return the rows and columns of the weight that change."""
        indices = {"rows": self.out_scale.nonzero().flatten(), "columns": self.in_scale.nonzero().flatten()}
        return {part: index for part, index in indices.items() if len(index)}

    @property
    def moves_bias(self) -> bool:
        return self.bias is not None and bool(torch.cat([self.in_shift, self.out_scale, self.out_shift]).any())

    def changes(self, weight: Tensor, bias: Tensor | None) -> list[Change]:
        """Compute the changes in float32 and round once: the same from a file, on a CPU and on a GPU."""
        side = {"rows": self.out_scale.to(weight.device), "columns": self.in_scale.to(weight.device)}
        changes = []
        for part, index in self.parts().items():
            index = index.to(weight.device)
            old = weight.index_select(DIMENSIONS[part], index)
            scale = {**side, part: side[part][index]}
            new = _wide(old) * (1 + scale["rows"])[:, None] * (1 + scale["columns"])
            changes.append(Change(self.weight, part, index, old, _rounded(new, old, self.weight)))
        if self.moves_bias:
            into, out = self.in_shift.to(bias.device), self.out_shift.to(bias.device)
            new = _wide(bias)
            if into.any():
                at = into.nonzero().flatten()
                # on the CPU, where sums have one order
                columns = _wide(weight.index_select(-1, at.to(weight.device)).cpu())
                new = new + (columns @ into[at].cpu().to(columns.dtype)).to(bias.device)
            new = new * (1 + side["rows"].to(bias.device)) + out
            everywhere = torch.arange(len(bias), device=bias.device)
            changes.append(Change(self.bias, "columns", everywhere, bias.clone(), _rounded(new, bias, self.bias)))
        return changes


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rounded(new: Tensor, old: Tensor, name: str) -> Tensor:
    rounded = new.to(old.dtype)
    if not torch.isfinite(rounded).all():
        raise AUSteerError(f"{name} would overflow in {old.dtype}; lower alpha, or use bfloat16 or float32 weights")
    return rounded


@dataclass
class Tally:
    """Count the rows and columns that a plan changes, and name those that rounding leaves as they were."""

    changed: int = 0
    unchanged: dict[str, list[int]] = field(default_factory=dict)

    def count(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self.changed += len(change.index)
            if same := change.unchanged():
                self.unchanged[f"{change.part} of {change.tensor}"] = same
            self.dtype = change.new.dtype

    def check(self) -> None:
        """Refuse a plan that changes nothing at all."""
        if self.changed == sum(map(len, self.unchanged.values())):
            raise AUSteerError(
                f"{str(self.dtype).removeprefix('torch.')} cannot hold this plan: rounded, every row and column it "
                "scales is what it was; raise alpha, use a float32 checkpoint, or steer live"
            )


def find_edits(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> list[Edit]:
    """Return an edit for each weight the plan touches, of tensors with these shapes; refuse what cannot be exact."""
    check_foldable(plan)
    edits, reached = [], set()
    for name, shape in shapes.items():
        match = PROJECTION.search(name)
        if match is None:
            continue
        layer, attention = int(match[1]), match[2].endswith("o_proj")
        inside, outside = ("attention", None) if attention else ("neuron", "ffn")
        edit = Edit(
            name,
            _bias(name, shapes),
            *(_values(plan, kind, inside, layer, shape[-1], name) for kind in ("scales", "shifts")),
            *(_values(plan, kind, outside, layer, shape[-2], name) for kind in ("scales", "shifts")),
        )
        if edit.bias is None and (edit.in_shift.any() or edit.out_shift.any()):
            raise AUSteerError(
                f"the plan shifts, and a shift becomes a bias, but {name} has none: "
                + ("experts have no biases" if "expert" in name else "this checkpoint was made without")
                + "; steer live"
            )
        reached |= {(inside, layer), (outside, layer)}
        if edit.parts() or edit.moves_bias:
            edits.append(edit)
    missing = sorted({au[:2] for au in plan.aus()} - reached)
    if missing:
        site, layer = missing[0]
        raise AUSteerError(
            f"the checkpoint lacks the weight at site {site} of layer {layer}: get the whole checkpoint of the plan's "
            "model"
        )
    return edits


def layer_of(weight: str) -> int:
    return int(PROJECTION.search(weight)[1])


def check_foldable(plan: Plan) -> None:
    """Refuse a plan that neither weights nor adapters can express."""
    if any(au[0] == "layer" for au in plan.aus()):
        raise AUSteerError(
            "site layer cannot go into weights: the residual stream runs past every one of them, so no weight's "
            "rows or columns are its scale; steer live, or rank attention or ffn"
        )
    if plan.tokens != "all":
        raise AUSteerError(f"a weight acts on every token, but the plan steers only {plan.tokens!r} ones; steer live")
    if not len(plan):
        raise AUSteerError("the plan touches no AU: there is nothing to export")


def _bias(weight: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    name = weight.removesuffix(".weight") + ".bias"
    return name if name in shapes else None


def _values(plan: Plan, kind: str, site: str | None, layer: int, width: int, name: str) -> Tensor:
    values = getattr(plan, kind).get(site)
    if values is None or layer >= len(values):
        return torch.zeros(width)
    if values.shape[1] != width:
        raise AUSteerError(f"{name} has {width} AUs at site {site}, the plan {values.shape[1]}: not the plan's model")
    return values[layer]
