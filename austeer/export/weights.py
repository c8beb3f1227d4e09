"""Find the weights that a plan changes, and compute what they become. Folding, patching and adapters all start here.

A site is the input or output of a linear map y = W x + c, so a plan's x -> x * (1 + s) + b goes into W and c exactly:

    input    attention, neuron    W (x (1 + s) + b) + c    =  [W (1 + s)] x + (c + W b)
    output   ffn                  (W x + c) (1 + s) + b    =  [(1 + s) W] x + (c (1 + s) + b)

`rmodels.linear_maps` says which maps a model has, and which axis of a weight is which: the inputs of a Linear are its
columns, those of a Conv1D its rows. The output of a mixture of experts is a weighted sum over them: the plan scales the
outputs of every expert, and of a shared one. A post-norm is no exception: it comes after the ffn site.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.plan import Plan
from rmodels import LinearMap, linear_maps

DIMENSIONS = {"rows": -2, "columns": -1}  # axes of a weight, also of fused experts; a bias has only "columns"


@dataclass(frozen=True)
class Change:
    """Hold rows or columns of a tensor, or a whole bias, as they were and as they become."""

    tensor: str
    part: str  # a key of DIMENSIONS
    index: Tensor
    old: Tensor
    new: Tensor
    is_whole: bool = False  # a bias: parts of it may stay as they were

    def unchanged(self) -> list[int]:
        """Return the indices that rounding leaves as they were, bit for bit."""
        if self.is_whole:
            return [] if not torch.equal(self.new, self.old) else self.index.tolist()
        same = (self.new == self.old).movedim(DIMENSIONS[self.part], 0).flatten(1).all(1)
        return self.index[same].tolist()


@dataclass(frozen=True)
class Edit:
    """Say what a plan does to one linear map: scales and shifts of its inputs and of its outputs, float32.

    Fused experts have weights of three axes. Each of them has inputs of its own, so `in_scale` and `in_shift` are
    (experts, inputs) there.
    """

    layer: int
    site: str | None  # where the plan steers it, for messages
    map: LinearMap
    in_scale: Tensor
    in_shift: Tensor
    out_scale: Tensor
    out_shift: Tensor

    @property
    def weight(self) -> str:
        return self.map.weight

    @property
    def bias(self) -> str | None:
        return self.map.bias

    @property
    def module(self) -> str:
        """Return the module that holds the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def is_fused(self) -> bool:
        """Say whether the weight holds several experts."""
        return self.in_scale.dim() == 2

    def of_expert(self, index: int, linear: LinearMap) -> Edit:
        """Return the part of one expert, whose weight and bias are tensors of their own."""
        return replace(self, map=linear, in_scale=self.in_scale[index], in_shift=self.in_shift[index])

    def parts(self) -> dict[str, Tensor]:
        """Return the rows and columns of the weight that change."""
        indices = {self.map.outputs: self.out_scale.nonzero().flatten()}
        indices[self.map.inputs] = self.in_scale.reshape(-1, self.in_scale.shape[-1]).any(0).nonzero().flatten()
        return {part: indices[axis] for part, axis in DIMENSIONS.items() if len(indices[axis])}

    @property
    def moves_bias(self) -> bool:
        return self.bias is not None and any(
            bool(values.any()) for values in (self.in_shift, self.out_scale, self.out_shift)
        )

    def changes(self, weight: Tensor, bias: Tensor | None) -> list[Change]:
        """Compute the changes in float32 and round once: the same from a file, on a CPU and on a GPU."""
        sides = {self.map.outputs: self.out_scale.to(weight.device), self.map.inputs: self.in_scale.to(weight.device)}
        changes = []
        for part, index in self.parts().items():
            index = index.to(weight.device)
            old = weight.index_select(DIMENSIONS[part], index)
            new = _wide(old)
            for axis, scale in sides.items():
                new = new * (1 + along(scale[..., index] if axis == DIMENSIONS[part] else scale, axis))
            changes.append(Change(self.weight, part, index, old, _rounded(new, old, self.weight)))
        if self.moves_bias:
            into, out = self.in_shift.to(bias.device), self.out_shift.to(bias.device)
            new = _wide(bias)
            if into.any():
                at = into.reshape(-1, into.shape[-1]).any(0).nonzero().flatten()
                # on the CPU, where sums have one order
                columns = _wide(weight.index_select(self.map.inputs, at.to(weight.device)).cpu())
                shift = into[..., at].cpu().to(columns.dtype)[..., None]
                new = new + (columns.movedim(self.map.inputs, -1) @ shift)[..., 0].to(bias.device)
            new = new * (1 + self.out_scale.to(bias.device)) + out
            everywhere = torch.arange(bias.shape[-1], device=bias.device)
            rounded = _rounded(new, bias, self.bias)
            changes.append(Change(self.bias, "columns", everywhere, bias.clone(), rounded, is_whole=True))
        return changes


def along(scale: Tensor, axis: int) -> Tensor:
    """Give a scale, perhaps one per expert, the axes of the weight that it multiplies along this axis."""
    return scale.unsqueeze(-1 if axis == -2 else -2)


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


def find_edits(plan: Plan, model: PreTrainedModel) -> list[Edit]:
    """Return an edit for each weight of the model (perhaps without weights) that the plan touches; refuse what cannot be
    exact."""
    check_foldable(plan)
    maps = list(linear_maps(model))
    # the output of a mixture has several maps, or one that holds several experts
    summed = Counter((layer, outside) for layer, _, outside, _ in maps if outside)
    edits, reached = [], set()
    for layer, inside, outside, linear in maps:
        shape = weight_shape(model, linear.weight)
        experts, inputs, outputs = shape[:-2], shape[linear.inputs], shape[linear.outputs]
        into = [_values(plan, kind, inside, layer, (*experts, inputs), linear) for kind in ("scales", "shifts")]
        out_of = [_values(plan, kind, outside, layer, (outputs,), linear) for kind in ("scales", "shifts")]
        edit = Edit(layer, inside if any(values.any() for values in into) else outside, linear, *into, *out_of)
        is_mixture = bool(experts) or summed[layer, outside] > 1
        if linear.bias is None and (edit.in_shift.any() or edit.out_shift.any()):
            raise AUSteerError(
                f"the plan shifts, and a shift becomes a bias, but {linear.weight} has none: "
                + ("experts have no biases" if is_mixture else "this checkpoint was made without")
                + "; steer live"
            )
        if edit.out_shift.any() and is_mixture:
            raise AUSteerError(
                f"the plan shifts the ffn output of layer {layer}, which weighs many experts: their biases would be "
                "weighed too; steer live"
            )
        reached |= {(inside, layer), (outside, layer)}
        if edit.parts() or edit.moves_bias:
            edits.append(edit)
    missing = sorted({au[:2] for au in plan.aus()} - reached)
    if missing:
        site, layer = missing[0]
        raise AUSteerError(
            f"layer {layer} of this {model.config.model_type} model has no weight at site {site}; steer live"
        )
    return edits


def weight_shape(model: PreTrainedModel, weight: str) -> tuple[int, ...]:
    """Return the shape of a weight, also where it is packed."""
    module = model.get_submodule(weight.rpartition(".")[0])
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(model.get_parameter(weight).shape)


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


def _values(plan: Plan, kind: str, site: str | None, layer: int, shape: tuple[int, ...], linear: LinearMap) -> Tensor:
    """Return a plan's values at one end of a map. Where layers differ in width, plans are as wide as the widest."""
    values, width = getattr(plan, kind).get(site), math.prod(shape)
    if values is None or layer >= len(values):
        return torch.zeros(shape)
    if values.shape[1] < width:
        raise AUSteerError(
            f"{linear.weight} has {width} AUs at site {site}, the plan {values.shape[1]}: not the plan's model"
        )
    if beyond := values[layer, width:].nonzero().flatten().tolist():
        raise AUSteerError(
            f"the plan steers AU {width + beyond[0]} at site {site} of layer {layer}, which has only {width}: "
            "not the plan's model"
        )
    return values[layer, :width].reshape(shape)
