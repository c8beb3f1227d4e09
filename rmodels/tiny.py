"""Build a tiny random model of any model type that transformers knows, of the true class: what tests and docs/models.md try.

A config is made small field by field, by the names of its fields; what goes by other rules stands in `SPECIAL`.
"""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import rmodels

# with a vision tower, where a type has both
CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
LAYERS, VOCABULARY = 4, 320
# what the fields of configs are called, and their values here; of several rules that match, the last one counts
RULES = {
    r"vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|embedding_dim|hidden_dim|dim_model(_base)?|word_embed_proj_dim|out_hidden_size|output_dim|output_hidden_size|text_hidden_size": 64,
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|encoder_layers|depth": LAYERS,
    r"num_attention_heads|n_heads?|num_heads|encoder_attention_heads|swa_num_attention_heads": 4,
    r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads": 2,
    r"head_dim|swa_head_dim|attention_head_dim|dim_head|global_head_dim|kv_channels": 16,
    r".*intermediate_size|.*ffn_dim|.*ffn_hidden_size|n_inner|dff|dim_ff|intermediate_size_mlp|mlp_dim": 96,
    r"(moe|shared|expert)_.*(intermediate|ffn_hidden)_size": 24,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    r"n_groups?|topk_group|mamba_n_groups|mamba_ngroups|num_expert_group": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"(q|kv|o)_lora_rank": 32,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"(qk_nope|v)_head_dim": 16,
    r"linear_(key_|value_)?head_dim": 16,
    r"linear_num_(key_)?heads": 2,
    r"linear_num_value_heads": 4,
    r"(mamba_n|n_mamba|mamba_num)_heads": 8,
    r"mamba_(d_head|head_?dim)": 16,
    r"mamba_d_state|(ssm_)?state_size": 8,
    r"mamba_dt_rank|time_step_rank": 8,
    r"(mamba_)?chunk_size": 16,
    r"index_topk": 64,
    r"index_head_dim": 16,
    r"index_n_heads": 2,
    r"sliding_window(_size)?|(attention_)?window_size|local_attention": 12,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length": 256,
    r"hidden_size_per_layer_input|ple_embed_dim": 16,
    r"query_pre_attn_scalar": 16,
    r"base_channels": 32,
    r"image_token_embed_dim|projection_dim|projector_(input|output)_dim|vision_output_dim|num_embeddings": 64,
    r"initializer_range|init_std|initializer_factor": 0.2,
}
NEEDED = ("head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok")  # also where None


def _rope(*sections: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


# what the rules get wrong, by model type
SPECIAL: dict[str, dict] = {
    "axk1": dict(topk_group=1),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "blt": dict(encoder_hash_byte_group_vocab=VOCABULARY),
    "chameleon": dict(vocabulary_map={"<image>": 4}),
    "cohere_compass_text": dict(
        rope_parameters={kind: _rope(2, 3, 3)["rope_parameters"] for kind in ("full_attention", "sliding_attention")}
    ),
    "cosmos3_edge_text": _rope(2, 3, 3),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"] * 2, n_group=1, topk_group=1),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1),
    "emu3": dict(vocabulary_map={"<image>": 4}),
    "ernie4_5_vl_moe_text": _rope(3, 3, 2) | dict(moe_intermediate_size=[24, 24]),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(intermediate_size=96, num_kv_shared_layers=2),
    "glm4v_moe_text": _rope(1, 1, 2),
    "glm4v_text": _rope(2, 3, 3),
    "glm5_next_text": dict(qk_rope_head_dim=0),
    "glm_ocr_text": _rope(2, 3, 3),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "hunyuan_vl_text": _rope(2, 2, 2, 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8),
    "paddleocr_vl_text": _rope(2, 3, 3),
    "qwen2_5_omni_text": _rope(2, 3, 3),
    "qwen2_5_vl_text": _rope(2, 3, 3),
    "qwen2_vl_text": _rope(2, 3, 3),
    "qwen4_exp_text": dict(
        indexer_compress_ratio=2, indexer_budget=32, indexer_kv_heads=1, indexer_n_heads=2, indexer_head_dim=16
    ),
    "radio": dict(video_temporal_patch_size=2),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 48], axial_pos_shape=[4, 64]),
    "step3p5": dict(sliding_window=12, share_expert_dim=24),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a small config of this type."""
    config = AutoConfig.for_model(**_small(AutoConfig.for_model(model_type).to_dict()))
    config.architectures = [CLASSES[model_type]]
    return config


def _small(config: dict) -> dict:
    """Return the fields of a config, and of the configs in it, that have to change."""
    fields = {"model_type": config["model_type"]}
    layers = next((config[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in config), None)
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            fields[name] = _small(value)
        elif isinstance(value, list) and layers and len(value) == layers:
            fields[name] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]  # every kind of layer
        elif (isinstance(value, int | float) and not isinstance(value, bool)) or (value is None and name in NEEDED):
            is_token = name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY
            values = [3] if is_token else [small for rule, small in RULES.items() if re.fullmatch(rule, name)]
            if values:
                fields[name] = values[-1]
    if "qk_rope_head_dim" in fields:
        fields.pop("head_dim", None)  # follows from it
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention shares no keys among heads
    return fields | SPECIAL.get(config["model_type"], {})


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build upstream's class with random weights. Constants, such as zero biases, get noise: a zero shows nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = rmodels.model_class(config)(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.is_floating_point() and bool((weight == weight.flatten()[0]).all()):
                    weight += 0.05 * torch.randn_like(weight)
    return model.eval().requires_grad_(False)
