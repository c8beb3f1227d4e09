"""A user's own pairs as a task: an item is right if the model prefers its right answer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from austeer.errors import AUSteerError
from austeer.forward import input_device
from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.answering.decoding_cache import DecodingCache
from eval.tasks.base import PairSet, Scores, Task
from eval.tasks.likelihood import encoded_items, log_probabilities
from rmodels import context_length


class PairTask(Task):
    """Split pairs 50/20/30 by the hash of the prompt, so that a prompt that occurs twice stays on one side."""

    test_split = "held-out pairs"
    answered_in_words = False

    def __init__(self, name: str, pairs: Sequence[Pair], *, limit: int | None = None, **ranking):
        """Split the pairs. ranking: see `Task`."""
        super().__init__(**ranking)
        self.name = name
        parts: dict[str, list[Pair]] = {"pairs": [], "validation": [], "test": []}
        for pair in pairs:
            share = int(hashlib.sha256(pair.prompt.encode()).hexdigest()[:8], 16) / 2**32
            parts["pairs" if share < 0.5 else "validation" if share < 0.7 else "test"].append(pair)
        if min(map(len, parts.values())) < 2:
            counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
            raise AUSteerError(
                f"too few different prompts to rank, choose and test on ({len(pairs)} pairs fall into {counts}); "
                "about 100 are a sensible minimum"
            )
        self._ranking = parts["pairs"]
        self.validation, self.test = parts["validation"][:limit], parts["test"][:limit]

    def own_pairs(self) -> PairSet:
        return PairSet(self._ranking, [pair.prompt for pair in self._ranking])

    @torch.inference_mode()
    def answers(self, answerer, items: Sequence[Pair], file=None, progress=None) -> list[Answer]:
        """Return for each pair its log-odds, and its prompt's surprise and number of tokens. Nothing is generated."""
        model, tokenizer = answerer.model, answerer.tokenizer
        right, wrong = log_probabilities(model, encoded_items(items, tokenizer, context_length(model))).unbind(1)
        odds = (right - wrong).tolist()
        prompts = dict.fromkeys(pair.prompt for pair in items)
        surprise = {prompt: _surprise(model, tokenizer, prompt) for prompt in prompts}
        return [Answer("", (value, *surprise[pair.prompt])) for value, pair in zip(odds, items, strict=True)]

    def columns(self, items: Sequence[Pair], answers: Sequence[Answer]) -> Scores:
        odds = [answer.options[0] for answer in answers]
        main = "right answer preferred"
        return Scores(main, {main: [value > 0 for value in odds], "log-odds": odds})

    def extras(self, answerer, items: Sequence[Pair], answers: Sequence[Answer]) -> dict[str, float]:
        """Return the perplexity of the prompts, which no plan means to change: what steering costs elsewhere."""
        once = {pair.prompt: answer.options[1:] for pair, answer in zip(items, answers, strict=True)}
        loss, count = (sum(column) for column in zip(*once.values(), strict=True))
        return {"perplexity": math.exp(loss / max(1, count))}


def _surprise(model, tokenizer, text: str) -> tuple[float, int]:
    """Return minus the log-probability of a text after its first token, and how many tokens that are.

    To a plan for some tokens only, these count as generated: what would it cost to write this text?
    """
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=input_device(model))
    cache = DecodingCache(model.config, ids.shape[1], prompt_end=1)
    logp = model(ids, past_key_values=cache, use_cache=True).logits[0, :-1].float().log_softmax(-1)
    return -float(logp.gather(1, ids[0, 1:, None].to(logp.device)).sum()), ids.shape[1] - 1
