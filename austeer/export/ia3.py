"""Export a plan as a PEFT IA3 adapter: one factor per AU, 1 where nothing is scaled.

IA3 multiplies the input of its "feedforward modules" and the output of its other modules: exactly the attention and
the ffn site. PEFT can merge the adapter or train it further, with the plan as the starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.export.adapter import Source, compose, open_weights, scaled_modules, write_adapter
from austeer.plan import Plan


def save_ia3(source: Source, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one adapter, and return how many modules it has. No weight is read."""
    plan = compose(plans)
    weights = open_weights(source, plan)
    tensors, on_inputs = {}, []
    edits = scaled_modules(weights, plan, "an IA3")
    for name, edit in edits.items():
        if edit.in_scale.any() and edit.out_scale.any():
            raise AUSteerError(f"inputs and outputs of {name} are scaled; IA3 has one vector per module; write a LoRA")
        if edit.in_scale.any():
            on_inputs.append(name)
            factors = (1 + edit.in_scale)[None]  # PEFT's shapes: a row for inputs, a column for outputs
        else:
            factors = (1 + edit.out_scale)[:, None]
        tensors[f"base_model.model.{name}.ia3_l"] = factors
    config = {"peft_type": "IA3", "target_modules": sorted(edits), "feedforward_modules": sorted(on_inputs)}
    write_adapter(out, weights, plan, tensors, config)
    return len(edits)
