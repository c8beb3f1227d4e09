"""What every adapter shares: the modules a plan touches, the weights it needs of them, the folder it becomes.

A plan that only scales multiplies columns or rows of two matrices per layer, which is why it fits into an adapter:
    attention   input of o_proj        columns of o_proj
    neuron      input of down_proj     columns of down_proj
    ffn         output of down_proj    rows of down_proj
Nothing here loads a model: its shape is built without memory, and of its checkpoint only these rows and columns are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.export.checkpoint import Checkpoint, local_folder, new_folder, without_weights
from austeer.files import save_readable
from austeer.identity import check_made_for
from austeer.plan import Plan
from rmodels import AUGate


@dataclass
class Touched:
    """A linear module under a plan: gamma of its inputs and of its outputs, None where nothing is scaled."""

    shape: tuple[int, int]  # (outputs, inputs), as its weight's
    bias: bool
    inputs: Tensor | None = None
    outputs: Tensor | None = None


def compose(plans: Plan | Sequence[Plan]) -> Plan:
    """Several plans as one: their scales add, as live."""
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    if not plans:
        raise AUSteerError("no plan was given")
    return reduce(add, plans)


def open_model(source: str | Path | PreTrainedModel) -> PreTrainedModel:
    """A loaded model as it is; of a checkpoint the patched model without its weights."""
    return source if isinstance(source, PreTrainedModel) else without_weights(source)


def touched(model: PreTrainedModel, plan: Plan, kind: str) -> dict[str, Touched]:
    """The modules a plan scales, by their name; refused is whatever `kind` of adapter could not do exactly."""
    if plan.tokens != "all":
        raise AUSteerError(
            f"the plan steers the tokens {plan.tokens!r}; {kind} adapter works on all of them. Steer live (set_MFU.steer), "
            "or make the plan with tokens='all'"
        )
    if any(values.any() for values in plan.shifts.values()):
        raise AUSteerError(
            f"the plan adds something to activations, and {kind} adapter has no bias to hold it; steer live "
            "(set_MFU.steer), or fold the plan into a checkpoint where the model has biases"
        )
    if "layer" in plan.scales and plan.scales["layer"].any():
        raise AUSteerError(
            "the plan scales the residual stream (site 'layer'), which passes through no weight of its own: "
            "no adapter can hold it; steer live (set_MFU.steer), or use the sites attention, ffn or neuron"
        )
    sites = [site for site in plan.sites if site != "layer"]
    check_made_for(model, {site: plan.shape(site) for site in sites}, plan.header, "this plan was")
    found: dict[str, Touched] = {}
    for name, gate in model.named_modules():
        if not isinstance(gate, AUGate) or gate.site not in sites or not plan.scale(gate.site, gate.layer).any():
            continue
        block = name.rpartition(".")[0]
        linear = f"{block}.{'o_proj' if gate.site == 'attention' else 'down_proj'}"
        module = getattr(model.get_submodule(block), linear.rpartition(".")[2], None)
        if module is None:
            raise AUSteerError(
                f"the plan scales the ffn output of layer {gate.layer}, which sums many experts: no single module has "
                "it as its output; fold the plan into a checkpoint, steer live, or use the attention site"
            )
        shape = (module.out_features, module.in_features)
        one = found.setdefault(linear, Touched(shape, module.bias is not None))
        if gate.site == "ffn":
            one.outputs = plan.scale(gate.site, gate.layer)
        else:
            one.inputs = plan.scale(gate.site, gate.layer)
    if not found:
        raise AUSteerError("the plan does nothing: there is no adapter to write")
    return found


def weight_reader(source: str | Path | PreTrainedModel) -> Callable[[str], Tensor]:
    """The matrix of a module by its name: a view into a checkpoint's file, or what a loaded (4-, 8-bit) model computes with."""
    if isinstance(source, PreTrainedModel):
        return partial(_in_memory, source)
    checkpoint = Checkpoint(local_folder(source))
    return lambda module: checkpoint.read(f"{module}.weight")


def _in_memory(model: PreTrainedModel, module: str) -> Tensor:
    # on demand: it imports bitsandbytes, which takes a second and has things to say
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    linear = model.get_submodule(module)
    if linear.weight.is_meta:
        raise AUSteerError(f"{module} is offloaded; name the checkpoint instead of the loaded model")
    return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None)).detach()


def write_adapter(
    out: str | Path, model: PreTrainedModel, plan: Plan, tensors: dict[str, Tensor], config: dict
) -> None:
    """A PEFT folder with its plan, made beside its place and renamed last: there is never half of one."""
    config = {
        **config,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base(model.config.name_or_path),
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    with new_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_readable(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        plan.save(folder / "plan.safetensors")  # readers of adapters ignore it
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _base(name_or_path: str) -> str:
    """Where readers find the model. Of a folder its whole path: a part of it would be a hub id, perhaps somebody's."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
