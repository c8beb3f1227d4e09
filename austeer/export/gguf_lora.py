"""Export a plan as a GGUF LoRA adapter for llama.cpp, with alpha as its run-time scale.

    plan = set_MFU(ranks, k=50, alpha=1.0)
    save_gguf_lora("meta-llama/Llama-2-7b-chat-hf", plan, "calm.gguf")
    llama-server -m model.gguf --lora calm.gguf        then per request: "lora": [{"id": 0, "scale": 1.5}]

The adapter of a plan is linear in its strength, so for a plan made at alpha 1 the scale of a request is alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from austeer.errors import AUSteerError, missing_extra
from austeer.export.adapter import Source, compose, open_weights
from austeer.export.lora import lora_factors
from austeer.files import check_new, write_whole
from austeer.plan import Plan

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma2": "gemma2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {"o_proj": "attn_output", "down_proj": "ffn_down"}


def save_gguf_lora(source: Source, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one GGUF file, and return how many modules it has."""
    try:
        from gguf import GGUFReader, GGUFWriter
    except ImportError:
        raise missing_extra("gguf", "export") from None
    plan, out = compose(plans), Path(out)
    weights = open_weights(source, plan)
    family = weights.skeleton.config.model_type
    if family not in ARCHITECTURES:
        raise AUSteerError(
            f"llama.cpp's name for {family} is not known here: add it to ARCHITECTURES in austeer/export/gguf_lora.py"
        )
    if {"ffn", "neuron"} <= {site for site in plan.sites if plan.scales[site].any()}:
        raise AUSteerError(
            "the plan scales inputs and outputs of the same matrices, which is not linear in alpha: write one GGUF "
            "file for each site"
        )
    check_new(out)
    factors, tensors = lora_factors(weights, plan), {}
    for name, (a, b) in factors.items():
        _, _, layer, _, linear = name.split(".")  # model.layers.3.mlp.down_proj
        for side, values in (("a", a), ("b", b)):
            tensors[f"blk.{layer}.{NAMES[linear]}.weight.lora_{side}"] = values.contiguous().numpy()

    def write(path: Path) -> None:
        writer = GGUFWriter(path, ARCHITECTURES[family])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # 0: the scale is the request's alone, not divided by a rank
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(path, tensors, GGUFReader)

    write_whole(out, write)
    return len(factors)


def _check(path: Path, tensors: dict[str, np.ndarray], reader: type) -> None:
    """Read the file back: numpy's tofile, which gguf uses, may not notice that the disk is full."""
    try:
        stored = {tensor.name: tensor.data for tensor in reader(path).tensors}
        complete = all(np.array_equal(stored[name], values) for name, values in tensors.items())
    except (ValueError, IndexError, KeyError):
        complete = False
    if not complete:
        raise OSError("the file came out incomplete; is the disk full?")
