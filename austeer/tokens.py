"""Turn pairs into token ids: the prefix that both texts share, and the tail of each.

Prompt and answer are joined as text and tokenized once. A BPE may merge letters across the seam, so the shared prefix
is the longest common prefix of the two token sequences, and not the tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.pairs import Pair


@dataclass(frozen=True)
class Protocol:
    """Say how pairs are read. Each field is one quirk; docs/fidelity.md gives the reason for both values."""

    name: str
    cut_at: int | None  # drop everything after this token; None: drop the prompt's start if the context is too short
    share_prompt: bool  # run what a pair shares once, batched; False: one full text per forward, unpadded
    round_to_half: bool  # round activations to float16 before taking the difference
    drop_refused_prompt: bool  # a positive with the stock refusal is used without its prompt
    first_pairs: int | None  # use at most this many pairs, and accept empty or equal answers
    refuse_overflow: bool  # inf or nan in an activation is an error; False: a warning, and counted by its sign


CLEAN = Protocol("clean", None, True, False, False, None, True)
PAPER = Protocol("paper", 512, False, True, True, 1000, False)
PROTOCOLS = {"clean": CLEAN, "paper": PAPER}
REFUSAL = "I'm sorry, but I can't assist"


def longest_text(rules: Protocol, context: int, max_length: int | None, batch_size: int | None) -> int:
    """Check the options, and return the longest text in tokens. The authors always cut at 512."""
    if not rules.share_prompt and (batch_size is not None or max_length is not None):
        raise AUSteerError("--protocol paper runs one text at a time, cut at 512: no --batch-size, no --max-length")
    if max_length is not None and not 1 <= max_length <= context:
        raise AUSteerError(f"the longest text must be from 1 to {context} tokens (the context), not {max_length}")
    if batch_size is not None and batch_size < 1:
        raise AUSteerError(f"the batch size must be at least 1, not {batch_size}")
    return rules.cut_at or max_length or context


@dataclass(frozen=True)
class EncodedPair:
    """Hold a pair's token ids. At most one tail is empty; without a shared prefix a tail is the whole text."""

    prefix: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    index: int = 0  # of the pair, among all that were encoded

    @property
    def tail(self) -> int:
        return max(len(self.positive), len(self.negative))

    @property
    def length(self) -> int:
        return len(self.prefix) + self.tail

    @property
    def cost(self) -> int:
        """Count the tokens to run: the prompt once, and both tails."""
        return self.length + self.tail


def encode(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, max_length: int
) -> tuple[list[EncodedPair], int]:
    """Return the pairs whose token sequences differ, and the number of equal ones (whose momentum is zero)."""
    texts = [_texts(pair, protocol) for pair in pairs]
    cut = {"truncation": True, "max_length": protocol.cut_at} if protocol.cut_at else {}
    rows = tokenizer([text for pair_texts in texts for text in pair_texts], **cut, verbose=False)["input_ids"]
    ids = [tuple(row) for row in rows]
    encoded, n_equal = [], 0
    for index, (positive, negative) in enumerate(zip(ids[::2], ids[1::2], strict=True)):
        if not positive or not negative:
            raise AUSteerError(f"pair {index}: a text has no tokens; give it some text")
        if not protocol.cut_at:
            positive, negative = _cut_prompt(positive, negative, max_length, tokenizer, index)
        if positive == negative:
            n_equal += 1
        elif protocol.share_prompt:
            # each text keeps at least one token in its tail: activations are read at the last one
            shared = min(common_length(positive, negative), len(positive) - 1, len(negative) - 1)
            encoded.append(EncodedPair(positive[:shared], positive[shared:], negative[shared:], index))
        else:
            encoded.append(EncodedPair((), positive, negative, index))
    return encoded, n_equal


def _texts(pair: Pair, protocol: Protocol) -> tuple[str, str]:
    prompt, positive, negative = pair
    is_refusal = protocol.drop_refused_prompt and REFUSAL in positive
    return (positive if is_refusal else prompt + positive), prompt + negative


def common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    differ = (i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b)
    return next(differ, min(len(some), len(others)))


def _cut_prompt(
    positive: tuple[int, ...], negative: tuple[int, ...], limit: int, tokenizer: PreTrainedTokenizerBase, index: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Drop the same tokens from the prompt of both texts, after a leading BOS, until both fit."""
    excess = max(len(positive), len(negative)) - limit
    if excess <= 0:
        return positive, negative
    lead = int(positive[0] in tokenizer.all_special_ids)
    shared = common_length(positive, negative)
    if lead + excess > shared:
        raise AUSteerError(f"pair {index}: an answer is longer than the context of {limit} tokens allows; shorten it")
    return tuple(ids[:lead] + ids[lead + excess :] for ids in (positive, negative))
