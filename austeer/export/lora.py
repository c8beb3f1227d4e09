"""Export a plan as a PEFT LoRA adapter. It is exact: W + B A equals the scaled W, with one rank per steered AU.

Inputs S scaled by gamma:   A = the one-hot rows of S, times gamma    B = the columns S of W, as they are
Outputs T scaled by gamma:  A = the rows T of W, as they are          B = the one-hot columns of T, times gamma
Gamma sits on the one-hot side, so W's own numbers stay as they are in any precision, and the adapter is linear in
alpha. Any server of LoRA adapters (vLLM, PEFT, ...) can then steer each request by its own plan.

Fused experts are reached through PEFT's `target_parameters`, which other readers do not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from austeer.errors import AUSteerError
from austeer.export.adapter import (
    LiveWeights,
    Source,
    compose,
    is_conv1d,
    open_weights,
    refuse_fused,
    scaling_edits,
    write_adapter,
)
from austeer.export.checkpoint import Checkpoint
from austeer.export.weights import Edit, along, weight_shape
from austeer.plan import Plan
from rmodels import linear_maps

# where PEFT refuses a LoRA on the output of a Mamba mixer, because Mamba's kernels read its weight past the module
MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


@dataclass(frozen=True)
class Lora:
    """Describe an adapter on disk."""

    folder: Path
    modules: tuple[str, ...]
    rank: int  # the largest of its modules
    parameters: tuple[str, ...] = ()  # weights that only PEFT adapts, of models with fused experts

    @property
    def targets(self) -> list[str]:
        """Return what vLLM's --lora-target-modules must name; every further one costs time."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    def check_for_vllm(self) -> None:
        """Refuse to serve what only PEFT reads."""
        if self.parameters:
            raise AUSteerError(
                f"{self.parameters[0]} belongs to an MLP of a family with experts, and vLLM looks for experts of its own "
                "under such names; use the attention site, or fold the plan"
            )

    def __str__(self) -> str:
        count = len(self.modules) + len(self.parameters)
        if self.parameters:
            advice = "for PEFT alone, since vLLM cannot adapt experts: fold the plan to serve it there"
        elif self.rank > VLLM_RANKS[-1]:
            advice = f"above vLLM's largest, {VLLM_RANKS[-1]}: fold the plan to serve it there"
        else:
            advice = f"vLLM needs --enable-lora --max-lora-rank {max_lora_rank(self.rank)}"
        return f"LoRA adapter in {self.folder}: {count} modules, rank {self.rank}; {advice}"


def max_lora_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM that admits adapters of this rank."""
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise AUSteerError(f"the adapter has rank {rank} (AUs in a module), vLLM allows {VLLM_RANKS[-1]}; lower k, or fold")


def save_lora(source: Source, plans: Plan | Sequence[Plan], out: str | Path) -> Lora:
    """Write the plans, added up, as one adapter for a checkpoint or a loaded (perhaps 4- or 8-bit) model."""
    plan = compose(plans)
    weights = open_weights(source, plan)
    edits = _edits(weights, plan)
    model, tensors, ranks, parameters = weights.skeleton, {}, {}, []
    # in families with experts PEFT takes any module called down_proj for old experts, but leaves parameters alone
    has_experts = any(len(weight_shape(model, linear.weight)) == 3 for *_, linear in linear_maps(model))
    for edit in edits:
        a, b = factors_of(edit, weights.as_loaded(edit.weight))
        by_parameter = has_experts and edit.site != "attention"
        name = edit.weight if by_parameter else edit.module
        parameters += [name] if by_parameter else []
        ranks[name] = a.shape[-2]
        if edit.is_fused:
            if getattr(model.get_submodule(edit.module), "is_transposed", False) != (edit.map.inputs == -2):
                raise AUSteerError(f"PEFT takes the axes of {edit.weight} for each other; fold the plan")
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # (experts * rank, inputs), (outputs, rank * experts)
        for factor, tensor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{published_name(model, f'{edit.module}.lora_{factor}.weight')}"] = tensor
    largest = max(ranks.values())
    # alpha equals rank everywhere, so PEFT's scaling alpha / rank is 1; with the largest rank as the default of both,
    # it is 1 also for readers that do not know the patterns
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    modules = [name for name in ranks if name not in parameters]
    config = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_conv1d(weights, edits[0]),
    }
    if parameters:
        config["target_parameters"] = parameters
    write_adapter(out, weights, plan, tensors, config)
    return Lora(Path(out), tuple(modules), largest, tuple(parameters))


def published_name(model: PreTrainedModel, name: str) -> str:
    """Return the name that a file must give to a tensor.

    PEFT renames what it reads as transformers renames published weights, and loses a name that is already the new one
    where the rule matches it again (`layers.` to `language_model.layers.`). Such a tensor gets the published name.
    """
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return name  # then PEFT renames nothing
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    if rename_source_key(name, renamings, [])[0] == name:
        return name
    backwards = [entry.reverse_transform() for entry in reversed(renamings)]
    published, _ = rename_source_key(name, backwards, [], reverse=True)
    if rename_source_key(published, renamings, [])[0] != name:
        raise AUSteerError(f"PEFT renames {name} and would not find it; fold the plan")
    return published


def lora_factors(weights: Checkpoint | LiveWeights, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (rank, inputs) and B (outputs, rank), float32, of every module that the plan scales."""
    edits = _edits(weights, plan)
    refuse_fused(edits)
    return {edit.module: factors_of(edit, weights.as_loaded(edit.weight)) for edit in edits}


def _edits(weights: Checkpoint | LiveWeights, plan: Plan) -> list[Edit]:
    edits = scaling_edits(weights, plan, "a LoRA")
    family = weights.skeleton.config.model_type
    for edit in edits:
        if family in MAMBA and edit.module.endswith("out_proj"):
            raise AUSteerError(f"readers of LoRA adapters refuse {edit.module} of {family}; use IA3, or fold the plan")
        if edit.bias and edit.out_scale.any():
            instead = "" if edit.is_fused else "use IA3, or "
            raise AUSteerError(f"{edit.module} has a bias, which a LoRA adapter cannot scale; {instead}fold the plan")
    return edits


def factors_of(edit: Edit, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (rank, inputs) and B (outputs, rank), of fused experts with one more axis in front."""
    weight = weight.movedim(edit.map.inputs, -1)  # (outputs, inputs) whatever the model's own order is
    outputs, inputs = weight.shape[-2:]
    column_scale, row_scale = edit.in_scale, edit.out_scale
    rows = row_scale.nonzero().flatten()
    count = int((column_scale != 0).sum(-1).max())  # experts with fewer AUs get some with a factor of zero
    columns = (column_scale != 0).int().argsort(dim=-1, descending=True, stable=True)[..., :count]
    experts, rank = weight.shape[:-2], count + len(rows)
    if rank > min(outputs, inputs):  # then the difference as a whole has the lower rank
        weight = weight.float().cpu()
        difference = (1 + along(row_scale, -2)) * weight * (1 + along(column_scale, -1)) - weight
        one = torch.eye(min(outputs, inputs)).expand(*experts, -1, -1)
        return (difference, one) if outputs <= inputs else (one, difference)
    a, b = torch.zeros(*experts, rank, inputs), torch.zeros(*experts, outputs, rank)
    a[..., :count, :].scatter_(-1, columns[..., None], column_scale.gather(-1, columns)[..., None])
    b[..., :count] = weight.gather(-1, columns.to(weight.device).unsqueeze(-2).expand(*experts, outputs, count))
    if len(rows):  # of W with its columns already scaled: the two gates act one after the other
        a[..., count:, :] = weight[..., rows.to(weight.device), :].float().cpu() * (1 + along(column_scale, -1))
        b[..., rows, range(count, rank)] = row_scale[rows]
    return a, b
