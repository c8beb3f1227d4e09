"""A plan as a GGUF LoRA adapter for llama.cpp, with alpha as its run-time scale.

    plan = set_MFU(ranks, k=50, alpha=1.0)
    save_gguf_lora("meta-llama/Llama-2-7b-chat-hf", plan, "calm.gguf")
    llama-server -m model.gguf --lora calm.gguf        then per request: "lora": [{"id": 0, "scale": 1.5}]

The adapter of a plan is linear in its strength, so the scale of a request is alpha, if the plan was made at alpha 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from errors import AUSteerError
from export.adapter import compose, open_model
from export.lora import lora_factors
from plan import Plan

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma2": "gemma2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {"o_proj": "attn_output", "down_proj": "ffn_down"}


def save_gguf_lora(source: str | Path | PreTrainedModel, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one GGUF file; returns how many modules it has."""
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise AUSteerError("GGUF files need the package gguf (requirements2.txt)") from None
    plan, model, out = compose(plans), open_model(source), Path(out)
    if model.config.model_type not in ARCHITECTURES:
        raise AUSteerError(f"llama.cpp's name for {model.config.model_type} is not known here (export/gguf_lora.py)")
    if {"ffn", "neuron"} <= {site for site in plan.sites if plan.scales[site].any()}:
        raise AUSteerError(
            "the plan scales inputs and outputs of the same matrices, which is not linear in alpha; one GGUF file each"
        )
    if out.exists():
        raise AUSteerError(f"{out} exists already; remove it or choose another place")
    made = lora_factors(model, source, plan)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    writer = GGUFWriter(temporary, ARCHITECTURES[model.config.model_type])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # 0: the scale is the request's alone, not divided by a rank
    for name, (a, b) in made.items():
        _, _, layer, _, linear = name.split(".")  # model.layers.3.mlp.down_proj
        for side, values in (("a", a), ("b", b)):
            writer.add_tensor(f"blk.{layer}.{NAMES[linear]}.weight.lora_{side}", values.contiguous().numpy())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.rename(out)
    except OSError as error:
        raise AUSteerError(f"cannot write {out}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(made)
