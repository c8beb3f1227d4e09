"""Answer by likelihood: how probable a model finds the right and the wrong answer after a prompt. Nothing is generated."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.forward import PairTexts
from austeer.tokens import CLEAN, EncodedPair, common_length, encode

BATCH = 8  # pairs at once


def encoded_items(
    items: Sequence[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[EncodedPair]:
    """Encode (prompt, right answer, wrong answer), every one of them."""
    encoded, n_equal = encode(items, tokenizer, CLEAN, longest)
    if n_equal:
        raise AUSteerError("both answers of some pair are the same tokens; no model can prefer one")
    return encoded


def with_whole_answers(
    items: Sequence[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[EncodedPair]:
    """Encode items so that a tail is a whole answer: what both answers begin with belongs to each of them."""
    whole = []
    for (prompt, *_), pair in zip(items, encoded_items(items, tokenizer, sys.maxsize), strict=True):
        if pair.length > longest:
            raise AUSteerError(f"an item is longer than the model's context of {longest} tokens: {prompt[:40]!r}")
        # a BPE may merge letters across the seam, and the merged token belongs to the answer
        start = common_length(tokenizer(prompt)["input_ids"], pair.prefix)
        begun = pair.prefix[start:]
        whole.append(EncodedPair(pair.prefix[:start], begun + pair.positive, begun + pair.negative))
    return whole


@torch.inference_mode()
def log_probabilities(
    model: PreTrainedModel, encoded: Sequence[EncodedPair], batch_size: int | None = None, progress: str | None = None
) -> Tensor:
    """Return the log-probability of the right and of the wrong tail of each pair, (pairs, 2). progress: the title of a bar."""
    size, found = batch_size or BATCH, []
    for start in tqdm(range(0, len(encoded), size), desc=progress, unit=" batches", disable=progress is None):
        texts = PairTexts(model, encoded[start : start + size], logits=True)
        found.append(texts.log_probabilities().view(-1, 2).cpu())
    return torch.cat(found)
