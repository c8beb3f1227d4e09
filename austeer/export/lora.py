"""A plan as a PEFT LoRA adapter, exactly: W + B A is the scaled W, and B A has one rank per AU of the module.

Inputs S scaled by gamma:   A = the one-hot rows of S, times gamma    B = the columns S of W, as they are
Outputs T scaled by gamma:  A = the rows T of W, as they are          B = the one-hot columns of T, times gamma
Gamma sits on the one-hot side, so that W's own numbers stay as they are in any precision; it is linear in alpha.
Any server of LoRA adapters then steers each request by its own plan: vLLM, PEFT, and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.export.adapter import Touched, compose, open_model, touched, weight_reader, write_adapter
from austeer.plan import Plan
from rmodels import sites

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


@dataclass(frozen=True)
class Lora:
    """An adapter that was written."""

    folder: Path
    modules: tuple[str, ...]
    rank: int  # the largest of a module

    @property
    def targets(self) -> list[str]:
        """What vLLM's --lora-target-modules must name; every further one costs time."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    def __str__(self) -> str:
        if self.rank > VLLM_RANKS[-1]:
            served = f"above vLLM's largest, {VLLM_RANKS[-1]}: fold the plan to serve it there"
        else:
            served = f"vLLM needs --enable-lora --max-lora-rank {max_lora_rank(self.rank)}"
        return f"LoRA adapter in {self.folder}: {len(self.modules)} modules, rank {self.rank}; {served}"


def max_lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that admits adapters of this rank."""
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise AUSteerError(
        f"the adapter has rank {rank} (AUs in one module) and vLLM allows {VLLM_RANKS[-1]}; lower k, or fold the plan"
    )


def save_lora(source: str | Path | PreTrainedModel, plans: Plan | Sequence[Plan], out: str | Path) -> Lora:
    """Write the plans, added up, as one adapter for a checkpoint or a loaded (perhaps 4- or 8-bit) model."""
    plan, model = compose(plans), open_model(source)
    made = lora_factors(model, source, plan)
    ranks = {name: len(a) for name, (a, _) in made.items()}
    largest = max(ranks.values())
    # alpha equals rank everywhere, so PEFT's scaling alpha / rank is 1; the largest rank is the default of both, so
    # that it is 1 for readers that do not know the patterns, too
    fewer = {name: rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": fewer,
        "alpha_pattern": fewer,
        "target_modules": sorted(made),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = {}
    for name, (a, b) in made.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    write_adapter(out, model, plan, tensors, config)
    return Lora(Path(out), tuple(made), largest)


def lora_factors(
    model: PreTrainedModel, source: str | Path | PreTrainedModel, plan: Plan
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per touched module A (rank, inputs) and B (outputs, rank), float32."""
    modules = touched(model, plan, "a LoRA")
    for name, module in modules.items():
        if "neuron" not in sites(model) and name.endswith("down_proj"):
            raise AUSteerError(
                f"{name} is a dense layer of a family with experts, where readers of LoRA adapters look for experts "
                "under that name; use IA3, the attention site, or fold the plan"
            )
        if module.outputs is not None and module.bias:
            raise AUSteerError(f"{name} has a bias, which a LoRA adapter cannot scale; use IA3, or fold the plan")
    weight_of = weight_reader(source)  # may download: after the refusals
    return {name: _factors(module, weight_of(name)) for name, module in modules.items()}


def _factors(module: Touched, weight: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = module.shape
    into = torch.zeros(inputs) if module.inputs is None else module.inputs
    out = torch.zeros(outputs) if module.outputs is None else module.outputs
    columns, rows = into.nonzero().flatten().tolist(), out.nonzero().flatten().tolist()
    if len(columns) + len(rows) > min(outputs, inputs):  # so many that the whole difference has the lower rank
        weight = weight.float().cpu()
        difference = (1 + out)[:, None] * weight * (1 + into) - weight
        if outputs <= inputs:
            return difference, torch.eye(outputs)
        return torch.eye(inputs), difference
    a, b = torch.zeros(len(columns) + len(rows), inputs), torch.zeros(outputs, len(columns) + len(rows))
    if columns:
        a[range(len(columns)), columns] = into[columns]
        b[:, : len(columns)] = weight[:, columns]
    if rows:  # of the W whose columns are scaled already: the two gates act one after the other
        a[len(columns) :] = weight[rows].float().cpu() * (1 + into)
        b[rows, range(len(columns), len(columns) + len(rows))] = out[rows]
    return a, b
