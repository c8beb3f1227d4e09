"""What is measured: a task has pairs to rank by, validation items to choose by, and a test split.

`outcomes` says of each item whether the model, as it is given, gets it right. Tasks know no method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedded import tasks as small_world
from encoding import CLEAN, encode
from errors import AUSteerError
from eval.answering import greedy
from pair_texts import PairTexts
from pairs import Pair

PAIRS, VALIDATION, TEST = 500, 200, 2000


class EmbeddedTask:
    """One of the tasks of the embedded models: strict exact match of a greedy answer, or a polite reply."""

    measure = "accuracy"

    def __init__(self, name: str, test_split: str = "test", seed: int = 0, limit: int | None = None):
        if name not in small_world.TASKS:
            raise AUSteerError(f"unknown task {name!r}; the embedded tasks are {', '.join(small_world.TASKS)}")
        self.name, self.test_split = name, test_split
        self.pairs = [Pair(item.prompt, item.right, item.wrong) for item in small_world.items(name, "pairs", PAIRS)]
        self.validation = small_world.items(name, "validation", min(VALIDATION, limit or VALIDATION))
        self.test = small_world.items(name, test_split, min(TEST, limit or TEST), seed)

    def outcomes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence) -> list[bool]:
        replies = greedy(model, tokenizer, [item.prompt for item in items], self._new_tokens)
        if self.name == "tone":
            return [small_world.is_polite(reply) for reply in replies]
        return [reply.strip() == item.right for reply, item in zip(replies, items, strict=True)]

    def prompted(self, items: Sequence) -> list:
        """The same items behind the instruction that asks for the behaviour: the prompt-only control."""
        return [replace(item, prompt=small_world.prompt_with_tag(item.prompt)) for item in items]

    @property
    def _new_tokens(self) -> int:
        return small_world.REPLY_WORDS if self.name == "tone" else 1

    @cached_property
    def fingerprint(self) -> str:
        return _hash([asdict(item) for item in (*self.validation, *self.test)])


class PairTask:
    """A user's own pairs: an item is right if the model prefers its right answer. Split 50/20/30 by hash."""

    measure = "right answer preferred"

    def __init__(self, name: str, pairs: Sequence[Pair], limit: int | None = None):
        self.name, self.test_split = name, "held-out pairs"
        parts: dict[str, list[Pair]] = {"pairs": [], "validation": [], "test": []}
        # by the prompt's text: a prompt that occurs twice stays on one side
        for pair in pairs:
            share = int(hashlib.sha256(pair.prompt.encode()).hexdigest()[:8], 16) / 2**32
            parts["pairs" if share < 0.5 else "validation" if share < 0.7 else "test"].append(pair)
        if min(map(len, parts.values())) < 2:
            counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
            raise AUSteerError(
                f"too few different prompts to rank, choose and test on ({len(pairs)} pairs fall into {counts}); "
                "about 100 are a sensible minimum"
            )
        self.pairs = parts["pairs"]
        self.validation, self.test = parts["validation"][:limit], parts["test"][:limit]

    def outcomes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Pair]) -> list[bool]:
        return [odds > 0 for odds in self.log_odds(model, tokenizer, items)]

    @torch.inference_mode()
    def log_odds(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Pair]
    ) -> list[float]:
        encoded, _ = encode(items, tokenizer, CLEAN, model.config.max_position_embeddings)
        if len(encoded) < len(items):
            raise AUSteerError("both answers of some pair are the same tokens; no model can prefer one")
        batches = (encoded[i : i + 8] for i in range(0, len(encoded), 8))
        return torch.cat([PairTexts(model, batch, logits=True).log_odds() for batch in batches]).tolist()

    @torch.inference_mode()
    def perplexity(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Of the test prompts themselves, which no plan means to change: what steering costs elsewhere."""
        loss, count = 0.0, 0
        for prompt in dict.fromkeys(item.prompt for item in self.test):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
            logp = model(ids).logits[0, :-1].float().log_softmax(-1)
            loss -= float(logp.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        return float(torch.tensor(loss / max(1, count)).exp())

    @cached_property
    def fingerprint(self) -> str:
        return _hash([list(pair) for pair in (*self.validation, *self.test)])


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
