"""Export a plan as a PEFT IA3 adapter: one factor per AU, 1 where nothing is scaled.

IA3 multiplies the input of its "feedforward modules" and the output of its other modules: exactly the attention and
the ffn site. PEFT can merge the adapter or train it further, with the plan as the starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.export.adapter import Source, compose, is_conv1d, open_weights, refuse_fused, scaling_edits, write_adapter
from austeer.plan import Plan


def save_ia3(source: Source, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one adapter, and return how many modules it has. No weight is read."""
    plan = compose(plans)
    weights = open_weights(source, plan)
    tensors, on_inputs = {}, []
    edits = scaling_edits(weights, plan, "an IA3")
    refuse_fused(edits)
    for edit in edits:
        if edit.in_scale.any() and edit.out_scale.any():
            raise AUSteerError(
                f"inputs and outputs of {edit.module} are scaled; IA3 has one vector per module; write a LoRA"
            )
        if edit.in_scale.any():
            on_inputs.append(edit.module)
            factors = (1 + edit.in_scale)[None]  # PEFT's shapes: a row for inputs, a column for outputs
        else:
            factors = (1 + edit.out_scale)[:, None]
        tensors[f"base_model.model.{edit.module}.ia3_l"] = factors
    modules = [edit.module for edit in edits]
    config = {"peft_type": "IA3", "target_modules": modules, "feedforward_modules": on_inputs}
    config["fan_in_fan_out"] = is_conv1d(weights, edits[0])
    write_adapter(out, weights, plan, tensors, config)
    return len(edits)
