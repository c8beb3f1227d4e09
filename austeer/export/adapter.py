"""What every adapter shares: which modules a plan scales, what their weights are, and the folder that is written.

A plan that only scales multiplies columns or rows of two matrices per layer (weights.py), so an adapter can hold it.
No model is loaded: only these rows and columns are read from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.export.checkpoint import Checkpoint, stored_dtype
from austeer.export.weights import Edit, find_edits, layer_of
from austeer.files import new_folder, save_readable, write_json
from austeer.identity import check_made_for
from austeer.plan import Plan


class LiveWeights:
    """Read a loaded model as a `Checkpoint` is read: 4-bit and 8-bit weights as the numbers it computes with."""

    def __init__(self, model: PreTrainedModel):
        self.skeleton, self.name = model, model.config.name_or_path
        self.shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):  # packed weights have another shape
                self.shapes[f"{name}.weight"] = (module.out_features, module.in_features)

    def read(self, name: str) -> Tensor:
        # imported on demand: bitsandbytes takes a second and prints
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        linear = self.skeleton.get_submodule(name.removesuffix(".weight"))
        if linear.weight.is_meta:
            raise AUSteerError(f"{name} is offloaded; name the checkpoint instead of the loaded model")
        return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None)).detach()


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


def scaled_modules(weights: Checkpoint | LiveWeights, plan: Plan, kind: str) -> dict[str, Edit]:
    """Return what the plan does to each module it scales, by the module's name; kind: "a LoRA" or "an IA3"."""
    if any(values.any() for values in plan.shifts.values()):
        raise AUSteerError(
            f"the plan adds something to activations, and {kind} adapter has no bias to hold it; steer live "
            "(set_MFU.steer), or fold the plan into a checkpoint where the model has biases"
        )
    check_made_for(weights.skeleton, {site: plan.shape(site) for site in plan.sites}, plan.header, "this plan was")
    edits = find_edits(plan, weights.shapes)
    for edit in edits:
        if "expert" in edit.weight:
            raise AUSteerError(
                f"the plan scales the ffn output of layer {layer_of(edit.weight)}, which sums many experts: no single "
                "module has it as its output; fold the plan into a checkpoint, steer live, or use the attention site"
            )
    return {edit.weight.removesuffix(".weight"): edit for edit in sorted(edits, key=lambda edit: edit.weight)}


def write_adapter(
    out: str | Path, weights: Checkpoint | LiveWeights, plan: Plan, tensors: dict[str, Tensor], config: dict
) -> None:
    """Write a PEFT folder with its plan: made beside its place and renamed last, so there is never half of one."""
    # PEFT finds the model by this. Part of a folder's path would read as a hub id, perhaps somebody else's
    base = str(Path(weights.name).resolve()) if Path(weights.name).is_dir() else weights.name
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"inference_mode": True, "fan_in_fan_out": False}
    with new_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_readable(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        plan.save(folder / "plan.safetensors")  # readers of adapters ignore it
        write_json(folder / "adapter_config.json", config)
