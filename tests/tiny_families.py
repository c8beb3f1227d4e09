"""Tiny checkpoints of families that get their gates by structure, and plans that touch every layer of them."""

import torch
from conftest import COMMON, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import rmodels
from austeer.identity import model_header
from austeer.plan import Plan

IDS = torch.tensor([[5, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17]])
TOKENS = dict(vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
HYBRID = ["linear_attention", "full_attention", "linear_attention"]

BY_STRUCTURE = {
    # Conv1D weights with biases, in files without the prefix "transformer."
    "gpt2": dict(n_embd=48, n_layer=3, n_head=4, n_positions=256, initializer_range=0.2, **TOKENS),
    "opt": dict(
        hidden_size=48, word_embed_proj_dim=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, init_std=0.2, **TOKENS,
    ),
    "bloom": dict(hidden_size=48, n_layer=3, n_head=4, initializer_range=0.2, **TOKENS),
    # fused experts that are stored transposed, with biases
    "gpt_oss": dict(COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=12),
    "mixtral": dict(COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(COMMON, **EXPERTS, shared_expert_intermediate_size=32, mlp_only_layers=[1]),
    "phi3": COMMON,
    "mamba2": dict(
        hidden_size=48, num_heads=6, head_dim=16, expand=2, state_size=8, n_groups=1, num_hidden_layers=3, chunk_size=8,
        initializer_range=0.2, **TOKENS,
    ),
    # layers of different width at site attention
    "qwen3_next": dict(
        COMMON, **EXPERTS, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=HYBRID,
    ),
    "gemma3_text": dict(COMMON, query_pre_attn_scalar=16, sliding_window=12),
}  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
WITH_VISION = {
    "gemma3": dict(text_config=BY_STRUCTURE["gemma3_text"], vision_config=VISION, mm_tokens_per_image=4),
    # experts that transformers transposes while loading
    "qwen3_vl_moe": dict(
        text_config=dict(COMMON, **EXPERTS, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48,
                           deepstack_visual_indexes=[0], num_position_embeddings=16),
    ),
}  # fmt: skip


def save_tiny(folder, name):
    """Save a checkpoint as upstream does, without zero biases, and return its folder."""
    torch.manual_seed(0)
    build = AutoModelForImageTextToText if name in WITH_VISION else AutoModelForCausalLM
    model = build.from_config(AutoConfig.for_model(name, **{**BY_STRUCTURE, **WITH_VISION}[name]))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
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
