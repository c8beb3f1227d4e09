"""Tiny random checkpoints of the paper's architectures: the real code paths without the real weights."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from eval.data.wording import OWN

VOCABULARY = 500
SHAPE = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=4096, bos_token_id=1, pad_token_id=0, initializer_range=0.2,
    eos_token_id=[2, *range(3, VOCABULARY, 4)],  # one token in four ends an answer: random weights would never end one
)  # fmt: skip
FAMILY_SHAPE = {
    "gemma2": dict(sliding_window=64, query_pre_attn_scalar=8),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}

TINY_AUS = SHAPE["hidden_size"]  # AUs of one layer's ffn, and the largest k
TINY_PAIRS = 8  # pairs to rank on
# the largest values of a study's params
MOST = {"n": 4, "items": 2, "trials": 2, "prompts": 2, "draws": 3, "k": TINY_AUS, "top": 4, "random": 8}


def shrink(params: dict) -> dict:
    """Shrink the params of a study so that they fit a tiny model."""
    limits = {"layer": SHAPE["num_hidden_layers"], "head": SHAPE["num_attention_heads"]}
    small = {
        key: value % limits[key] if key in limits and value is not None else value for key, value in params.items()
    }
    if small.get("dims"):
        small["dims"] = _distinct(small["dims"])
    if "paper_dims" in small:
        small["paper_dims"] = {key: _distinct(dims) for key, dims in small["paper_dims"].items()}
    if "answer" in small:
        small["answer"] = None  # the few items may have other answers
    if "step" in small:
        small["step"] = min(small["step"], 4)
    for key, most in MOST.items():
        if key in small:
            small[key] = min(small[key], most)
    return small | ({"ks": [4, 8]} if "ks" in small else {})


def _distinct(dims: list[int]) -> list[int]:
    """Return dimensions of a head, as many as these and all different."""
    distinct: list[int] = []
    for dim in dims[: SHAPE["head_dim"]]:
        free = (place % SHAPE["head_dim"] for place in count(dim))
        distinct.append(next(place for place in free if place not in distinct))
    return distinct


def tiny_checkpoints(known: dict[str, dict], folder: Path) -> dict[str, str]:
    """Return, by hub id, a folder with a random model of that architecture, made once."""
    folders = {}
    for name, model in known.items():
        path = folder / name
        if not (path / "config.json").exists():
            torch.manual_seed(0)
            tokenizer = small_tokenizer()
            shape = {**SHAPE, "vocab_size": len(tokenizer), **FAMILY_SHAPE.get(model["family"], {})}
            AutoModelForCausalLM.from_config(AutoConfig.for_model(model["family"], **shape)).save_pretrained(path)
            tokenizer.save_pretrained(path)
        folders[model["hub"]] = str(path)
    return folders


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and of the most common pieces of the prompts, which puts a BOS in front.

    Bytes alone would make texts half as long again, and a dry run would spend most of its time in attention.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator([OWN.read_text()], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
