"""Greedy answers of a model, steered or not: prompts in, texts out.

Prompts of one length run together, without padding, so a batch computes what a single prompt would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from errors import AUSteerError

BATCH_TOKENS = 16384


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """The text of exactly `new_tokens` greedy tokens behind each prompt (fewer where the text ends)."""
    ids = [tuple(row) for row in tokenizer(list(prompts))["input_ids"]]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(ids):
        by_length[len(row)].append(index)
    answers: list[str] = [""] * len(ids)
    for length, indices in by_length.items():
        size = max(1, BATCH_TOKENS // (length + new_tokens))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            new = _continue(model, torch.tensor([ids[i] for i in chosen], device=model.device), new_tokens)
            for index, row in zip(chosen, _until_end(new, model), strict=True):
                answers[index] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def _continue(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> list[list[int]]:
    cache = DynamicCache(config=model.config) if count > 1 else None
    new = []
    for _ in range(count):
        out = model(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        if not torch.isfinite(out.logits).all():
            raise AUSteerError("the model's logits are inf or nan: these answers are not scored")
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        new.append(tokens)
    return torch.cat(new, 1).tolist()


def _until_end(rows: list[list[int]], model: PreTrainedModel) -> list[list[int]]:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
