"""A plan as a PEFT IA3 adapter: one factor per AU, 1 where nothing is scaled.

IA3 multiplies the input of its "feedforward modules" and the output of its others, which are the attention and the
ffn site as they are. PEFT can merge it, and train it further: a plan is then a starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.export.adapter import compose, open_model, touched, write_adapter
from austeer.plan import Plan


def save_ia3(source: str | Path | PreTrainedModel, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one adapter; returns how many modules it has. No weight is read."""
    plan, model = compose(plans), open_model(source)
    tensors, on_inputs = {}, []
    modules = touched(model, plan, "an IA3")
    for name, module in modules.items():
        if module.inputs is not None and module.outputs is not None:
            raise AUSteerError(
                f"the plan scales both inputs and outputs of {name}, and IA3 has one vector per module; write a LoRA"
            )
        if module.inputs is not None:
            on_inputs.append(name)
            factors = (1 + module.inputs)[None]  # PEFT's shapes: a row for inputs, a column for outputs
        else:
            factors = (1 + module.outputs)[:, None]
        tensors[f"base_model.model.{name}.ia3_l"] = factors
    config = {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": sorted(on_inputs)}
    write_adapter(out, model, plan, tensors, config)
    return len(modules)
