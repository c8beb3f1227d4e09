"""Export a plan as a PEFT LoRA adapter, exactly: W + B A is the scaled W, and B A has one rank per AU of the module.

Inputs S scaled by gamma:   A = the one-hot rows of S, times gamma    B = the columns S of W, as they are
Outputs T scaled by gamma:  A = the rows T of W, as they are          B = the one-hot columns of T, times gamma
Gamma sits on the one-hot side, so W's own numbers stay as they are in any precision, and the adapter is linear in
alpha. Any server of LoRA adapters (vLLM, PEFT, ...) can then steer each request by its own plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.export.adapter import LiveWeights, Source, compose, open_weights, scaled_modules, write_adapter
from austeer.export.checkpoint import Checkpoint
from austeer.export.weights import Edit
from austeer.plan import Plan
from rmodels import sites

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


@dataclass(frozen=True)
class Lora:
    """Describe an adapter on disk."""

    folder: Path
    modules: tuple[str, ...]
    rank: int  # the largest of its modules

    @property
    def targets(self) -> list[str]:
        """Return what vLLM's --lora-target-modules must name; every further one costs time."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    def __str__(self) -> str:
        if self.rank > VLLM_RANKS[-1]:
            advice = f"above vLLM's largest, {VLLM_RANKS[-1]}: fold the plan to serve it there"
        else:
            advice = f"vLLM needs --enable-lora --max-lora-rank {max_lora_rank(self.rank)}"
        return f"LoRA adapter in {self.folder}: {len(self.modules)} modules, rank {self.rank}; {advice}"


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
    factors = lora_factors(weights, plan)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    largest = max(ranks.values())
    # alpha equals rank everywhere, so PEFT's scaling alpha / rank is 1; with the largest rank as the default of both,
    # it is 1 also for readers that do not know the patterns
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    write_adapter(out, weights, plan, tensors, config)
    return Lora(Path(out), tuple(factors), largest)


def lora_factors(weights: Checkpoint | LiveWeights, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (rank, inputs) and B (outputs, rank), float32, of every module that the plan scales."""
    edits = scaled_modules(weights, plan, "a LoRA")
    for name, edit in edits.items():
        if "neuron" not in sites(weights.skeleton) and name.endswith("down_proj"):
            raise AUSteerError(
                f"{name} is a dense layer of a family with experts, where readers of LoRA adapters look for experts "
                "under that name; use IA3, the attention site, or fold the plan"
            )
        if edit.bias and edit.out_scale.any():
            raise AUSteerError(f"{name} has a bias, which a LoRA adapter cannot scale; use IA3, or fold the plan")
    return {name: _factors(edit, weights.read(edit.weight)) for name, edit in edits.items()}


def _factors(edit: Edit, weight: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    column_scale, row_scale = edit.in_scale, edit.out_scale
    columns, rows = (scale.nonzero().flatten().tolist() for scale in (column_scale, row_scale))
    if len(columns) + len(rows) > min(outputs, inputs):  # then the difference as a whole has the lower rank
        weight = weight.float().cpu()
        difference = (1 + row_scale)[:, None] * weight * (1 + column_scale) - weight
        if outputs <= inputs:
            return difference, torch.eye(outputs)
        return torch.eye(inputs), difference
    a, b = torch.zeros(len(columns) + len(rows), inputs), torch.zeros(outputs, len(columns) + len(rows))
    if columns:
        a[range(len(columns)), columns] = column_scale[columns]
        b[:, : len(columns)] = weight[:, columns]
    if rows:  # of W with its columns already scaled: the two gates act one after the other
        a[len(columns) :] = weight[rows].float().cpu() * (1 + column_scale)
        b[rows, range(len(columns), len(columns) + len(rows))] = row_scale[rows]
    return a, b
