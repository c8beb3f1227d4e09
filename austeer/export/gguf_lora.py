"""A plan as a GGUF LoRA adapter for llama.cpp, with alpha as its run-time scale.

    plan = set_MFU(ranks, k=50, alpha=1.0)
    save_gguf_lora("meta-llama/Llama-2-7b-chat-hf", plan, "calm.gguf")
    llama-server -m model.gguf --lora calm.gguf        then per request: "lora": [{"id": 0, "scale": 1.5}]

The adapter of a plan is linear in its strength, so the scale of a request is alpha, if the plan was made at alpha 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from austeer.errors import AUSteerError, missing_extra
from austeer.export.adapter import compose, open_model
from austeer.export.checkpoint import check_new, new_place
from austeer.export.lora import lora_factors
from austeer.plan import Plan

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma2": "gemma2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {"o_proj": "attn_output", "down_proj": "ffn_down"}


def save_gguf_lora(source: str | Path | PreTrainedModel, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one GGUF file; returns how many modules it has."""
    try:
        from gguf import GGUFReader, GGUFWriter
    except ImportError:
        raise missing_extra("gguf", "export") from None
    plan, model, out = compose(plans), open_model(source), Path(out)
    if model.config.model_type not in ARCHITECTURES:
        raise AUSteerError(
            f"llama.cpp's name for {model.config.model_type} is not known here (austeer/export/gguf_lora.py)"
        )
    if {"ffn", "neuron"} <= {site for site in plan.sites if plan.scales[site].any()}:
        raise AUSteerError(
            "the plan scales inputs and outputs of the same matrices, which is not linear in alpha; one GGUF file each"
        )
    check_new(out)
    made = lora_factors(model, source, plan)
    tensors = {}
    for name, (a, b) in made.items():
        _, _, layer, _, linear = name.split(".")  # model.layers.3.mlp.down_proj
        for side, values in (("a", a), ("b", b)):
            tensors[f"blk.{layer}.{NAMES[linear]}.weight.lora_{side}"] = values.contiguous().numpy()
    with new_place(out) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURES[model.config.model_type])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # 0: the scale is the request's alone, not divided by a rank
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(temporary, tensors, GGUFReader)
    return len(made)


def _check(path: Path, tensors: dict[str, np.ndarray], reader: type) -> None:
    """Is there what was written? numpy's tofile, which gguf uses, need not notice that the disk is full."""
    try:
        there = {tensor.name: tensor.data for tensor in reader(path).tensors}
        whole = all(np.array_equal(there[name], values) for name, values in tensors.items())
    except (ValueError, IndexError, KeyError):
        whole = False
    if not whole:
        raise OSError("it came out incomplete; is the disk full?")
