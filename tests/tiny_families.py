"""Tiny checkpoints of families that get their gates by structure, and plans that touch every layer of them."""

import torch
from conftest import save_model
from safetensors.torch import load_file, save_file

import rmodels
from austeer.identity import model_header
from austeer.plan import Plan
from rmodels.tiny import tiny_config, tiny_model

IDS = torch.tensor([[5, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17]])
HEADS = dict(head_dim=20)  # 4 heads: they are as wide as nothing else, so that code that confuses widths fails
CHANGES = {
    "gpt2": {},  # Conv1D weights with biases, in files without the prefix "transformer."
    "opt": {},
    "bloom": {},
    "gpt_oss": HEADS,  # fused experts that are stored transposed, with biases
    "mixtral": HEADS,
    "qwen2_moe": HEADS | dict(mlp_only_layers=[1]),
    "phi3": HEADS,
    "mamba2": {},
    "qwen3_next": HEADS | dict(linear_value_head_dim=8),  # layers of different width at site attention
    "gemma3_text": HEADS,
}
BY_STRUCTURE = tuple(CHANGES)
WITH_VISION = ("gemma3", "qwen3_vl_moe")  # transformers transposes the experts of the latter while it loads them


def save_family(folder, name):
    """Save a checkpoint as it is published, and return its folder."""
    config = tiny_config(name)
    for field, value in CHANGES.get(name, {}).items():
        setattr(config, field, value)
    save_model(folder, tiny_model(config))
    if published := PUBLISHED_AS.get(name):
        tensors = published(load_file(folder / "model.safetensors"))
        save_file({key: weight.contiguous() for key, weight in tensors.items()}, folder / "model.safetensors")
    return folder


def _old_gpt2(tensors):
    """Drop the prefix, and add the masks that GPT-2's files hold and no model reads."""
    mask = {"h.0.attn.bias": torch.ones(1, 1, 256, 256)}
    return mask | {key.removeprefix("transformer."): weight for key, weight in tensors.items()}


def _old_qwen3_vl_moe(tensors):
    """Turn the experts, which transformers turns back while loading."""
    return {key: weight.mT if ".experts." in key else weight for key, weight in tensors.items()}


# what published files look like where today's transformers writes others
PUBLISHED_AS = {"gpt2": _old_gpt2, "qwen3_vl_moe": _old_qwen3_vl_moe}


def foldable_sites(model):
    return [site for site in rmodels.sites(model) if site != "layer"]


def plan_in_every_layer(model, sites, shift=0.0):
    """Return a plan with two AUs in each layer that has the site: an early one and the one before the last."""
    scales = {site: torch.zeros(rmodels.site_shape(model, site)) for site in sites}
    shifts = {site: torch.zeros(scale.shape) for site, scale in scales.items()} if shift else {}
    for site in sites:
        for gate in rmodels.gates(model, site):
            if gate.width:
                scales[site][gate.layer, 3], scales[site][gate.layer, gate.width - 2] = 0.9, -0.5
                if shift:
                    shifts[site][gate.layer, 5] = shift
    return Plan(scales, shifts, header=model_header(model))
