"""What every adapter shares: which weights a plan scales, what their weights are, and the folder that is written.

A plan that only scales multiplies inputs or outputs of two linear maps per layer (weights.py), so an adapter can hold it.
No model is loaded: only these rows and columns are read from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from austeer.errors import AUSteerError
from austeer.export.checkpoint import Checkpoint, stored_dtype
from austeer.export.weights import Edit, find_edits
from austeer.files import new_folder, save_readable, write_json
from austeer.identity import check_made_for
from austeer.plan import Plan


class LiveWeights:
    """Read a loaded model as a `Checkpoint` is read: 4-bit and 8-bit weights as the numbers it computes with."""

    def __init__(self, model: PreTrainedModel):
        self.skeleton, self.name = model, model.config.name_or_path

    def edits(self, plan: Plan) -> list[Edit]:
        return find_edits(plan, self.skeleton)

    def as_loaded(self, name: str) -> Tensor:
        # imported on demand: bitsandbytes takes a second and prints
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        module, weight = self.skeleton.get_submodule(name.rpartition(".")[0]), self.skeleton.get_parameter(name)
        if weight.is_meta:
            raise AUSteerError(f"{name} is offloaded; name the checkpoint instead of the loaded model")
        return dequantize_bnb_weight(weight, getattr(module, "state", None)).detach()


Source = str | Path | PreTrainedModel | Checkpoint


def open_weights(source: Source, plan: Plan) -> Checkpoint | LiveWeights:
    """Open a checkpoint by its folder, hub id or GGUF file, or a loaded model."""
    if isinstance(source, PreTrainedModel):
        return LiveWeights(source)
    return source if isinstance(source, Checkpoint) else Checkpoint(source, stored_dtype(plan))


def compose(plans: Plan | Sequence[Plan]) -> Plan:
    """Return several plans as one: their scales add, as they do live."""
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    if not plans:
        raise AUSteerError("no plan was given")
    return reduce(add, plans)


def scaling_edits(weights: Checkpoint | LiveWeights, plan: Plan, kind: str) -> list[Edit]:
    """Return what the plan does to each weight it scales, in order of name; kind: "a LoRA" or "an IA3"."""
    if any(values.any() for values in plan.shifts.values()):
        raise AUSteerError(
            f"the plan adds something to activations, and {kind} adapter has no bias to hold it; steer live "
            "(set_MFU.steer), or fold the plan into a checkpoint where the model has biases"
        )
    check_made_for(weights.skeleton, {site: plan.shape(site) for site in plan.sites}, plan.header, "this plan was")
    edits = sorted(weights.edits(plan), key=lambda edit: edit.weight)
    if len({is_conv1d(weights, edit) for edit in edits if not edit.is_fused}) > 1:
        raise AUSteerError(
            f"some weights are stored transposed, and {kind} adapter has one flag for all; fold the plan"
        )
    return edits


def refuse_fused(edits: Sequence[Edit]) -> None:
    """Refuse weights that hold several experts, where only modules can be adapted."""
    for edit in edits:
        if edit.is_fused:
            what = (
                f"the ffn output of layer {edit.layer}, which sums many experts: no single module has it as its output"
                if edit.site == "ffn"
                else f"neurons of layer {edit.layer}, where one weight holds many experts: they are no module's inputs"
            )
            raise AUSteerError(
                f"the plan scales {what}; fold the plan into a checkpoint, steer live, or use the attention site"
            )


def is_conv1d(weights: Checkpoint | LiveWeights, edit: Edit) -> bool:
    return isinstance(weights.skeleton.get_submodule(edit.module), Conv1D)


def write_adapter(
    out: str | Path, weights: Checkpoint | LiveWeights, plan: Plan, tensors: dict[str, Tensor], config: dict
) -> None:
    """Write a PEFT folder with its plan: made beside its place and renamed last, so there is never half of one."""
    # PEFT finds the model by this. Part of a folder's path would read as a hub id, perhaps somebody else's
    base = str(Path(weights.name).resolve()) if Path(weights.name).is_dir() else weights.name
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"inference_mode": True}
    with new_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_readable(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        plan.save(folder / "plan.safetensors")  # readers of adapters ignore it
        write_json(folder / "adapter_config.json", config)
