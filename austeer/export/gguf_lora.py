"""Export a plan as a GGUF LoRA adapter for llama.cpp, with alpha as its run-time scale.

    plan = set_MFU(ranks, k=50, alpha=1.0)
    save_gguf_lora("meta-llama/Llama-2-7b-chat-hf", plan, "calm.gguf")
    llama-server -m model.gguf --lora calm.gguf        then per request: "lora": [{"id": 0, "scale": 1.5}]

The adapter of a plan is linear in its strength, so for a plan made at alpha 1 the scale of a request is alpha.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from austeer.errors import AUSteerError, missing_extra
from austeer.export.adapter import Source, compose, open_weights
from austeer.export.lora import lora_factors
from austeer.files import check_new, write_whole
from austeer.plan import Plan
from rmodels import decoder_layers

# families that llama.cpp runs as another one; the rest have the same name there, but for dashes
ALIASES = {
    "mistral": "llama",
    "mixtral": "llama",
    "cohere": "command-r",
    "phi": "phi2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}


def save_gguf_lora(source: Source, plans: Plan | Sequence[Plan], out: str | Path) -> int:
    """Write the plans, added up, as one GGUF file, and return how many modules it has."""
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "export") from None
    plan, out = compose(plans), Path(out)
    weights = open_weights(source, plan)
    architecture = _architecture(gguf, weights.skeleton.config.model_type)
    if {"ffn", "neuron"} <= {site for site in plan.sites if plan.scales[site].any()}:
        raise AUSteerError(
            "the plan scales inputs and outputs of the same matrices, which is not linear in alpha: write one GGUF "
            "file for each site"
        )
    check_new(out)
    factors, tensors = lora_factors(weights, plan), {}
    places = gguf.get_tensor_name_map(architecture, len(decoder_layers(weights.skeleton)))
    for name, (a, b) in factors.items():
        place = _place(gguf, places, name, weights.skeleton.base_model_prefix)
        for side, values in (("a", a), ("b", b)):
            tensors[f"{place}.weight.lora_{side}"] = values.contiguous().numpy()

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # 0: the scale is the request's alone, not divided by a rank
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(path, tensors, gguf.GGUFReader)

    write_whole(out, write)
    return len(factors)


def _architecture(gguf: ModuleType, family: str) -> int:
    """Return the key of the package's tables for a family of transformers."""
    text = family.removesuffix("_text")
    wanted = ALIASES.get(text, text)
    for architecture, name in gguf.MODEL_ARCH_NAMES.items():
        if re.sub("[-_]", "", name) == re.sub("[-_]", "", wanted):
            return architecture
    raise AUSteerError(f"the gguf package knows no llama.cpp architecture for {family}: write a LoRA, or fold the plan")


def _place(gguf: ModuleType, places, module: str, prefix: str) -> str:
    """Return a module's name in GGUF files, where its weight must be the same matrix.

    Only the outputs of attention and of dense MLPs are known to be: llama.cpp permutes the heads of others.
    """
    text = module.replace("language_model.", "")
    for name in (text, text.removeprefix(f"{prefix}.")):
        kind, place = places.get_type_and_name(name) or (None, None)
        if kind in (gguf.MODEL_TENSOR.ATTN_OUT, gguf.MODEL_TENSOR.FFN_DOWN):
            return place
    raise AUSteerError(
        f"{module} may be stored in another order in GGUF files, or not at all: write a LoRA for PEFT, or fold the plan and "
        "convert the result"
    )


def _check(path: Path, tensors: dict[str, np.ndarray], reader: type) -> None:
    """Read the file back: numpy's tofile, which gguf uses, may not notice that the disk is full."""
    try:
        stored = {tensor.name: tensor.data for tensor in reader(path).tensors}
        complete = all(np.array_equal(stored[name], values) for name, values in tensors.items())
    except (ValueError, IndexError, KeyError):
        complete = False
    if not complete:
        raise OSError("the file came out incomplete; is the disk full?")
