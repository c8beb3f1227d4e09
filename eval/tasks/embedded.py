"""The tasks of the embedded models: strict exact match of a greedy answer, or a polite reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from embedded import tasks as small_world
from embedded.tasks import Item
from eval.answering.answerer import Generation
from eval.decomposition import LIKELIER, Preferences, auc
from eval.tasks.base import PairSet, Scores, Task
from eval.tasks.open_text import perplexity

PAIRS, VALIDATION, TEST = 500, 200, 2000
_items = cache(small_world.items)  # drawing them takes as long as answering some hundred


class EmbeddedTask(Task):
    def __init__(self, name: str, test_split: str = "test", seed: int = 0, *, limit: int | None = None, **ranking):
        """Draw the items. ranking: see `Task`."""
        super().__init__(**ranking)
        if name not in small_world.TASKS:
            raise AUSteerError(f"unknown task {name!r}; the embedded tasks are {', '.join(small_world.TASKS)}")
        self.name, self.test_split, self.multi_token = name, test_split, name == "tone"
        self.validation = list(_items(name, "validation", VALIDATION)[:limit])
        self.test = list(_items(name, test_split, TEST, seed)[:limit])

    def own_pairs(self) -> PairSet:
        pairs = [Pair(item.prompt, item.right, item.wrong) for item in _items(self.name, "pairs", PAIRS)]
        return PairSet(pairs, [pair.prompt for pair in pairs])

    def generation(self, answerer, items: Sequence[Item]) -> Generation:
        if self.name == "tone":
            return Generation(small_world.REPLY_WORDS)
        ids = answerer.tokenizer.convert_tokens_to_ids(list(small_world.ANSWERS[self.name]))
        return Generation(1, options=tuple((token,) for token in ids))

    def columns(self, items: Sequence[Item], answers) -> Scores:
        if self.name == "tone":
            return Scores("accuracy", {"accuracy": [small_world.is_polite(answer.text) for answer in answers]})
        words = [answer.text.strip() for answer in answers]
        columns = {
            "accuracy": [word == item.right for word, item in zip(words, items, strict=True)],
            LIKELIER: self.preferences(items, answers).right,
            "an option at all": [word in item.options for word, item in zip(words, items, strict=True)],
        }
        return Scores("accuracy", columns)

    def preferences(self, items: Sequence[Item], answers) -> Preferences | None:
        if self.name == "tone":
            return None
        place = {word: number for number, word in enumerate(small_world.ANSWERS[self.name])}
        odds = [
            answer.options[place[item.options[0]]] - answer.options[place[item.options[1]]]
            for answer, item in zip(answers, items, strict=True)
        ]
        return Preferences(odds, [item.right == item.options[0] for item in items])

    def extras(self, answerer, items: Sequence[Item], answers) -> dict[str, float]:
        """Return the perplexity of replies: a reply can be polite without being a reply at all."""
        if self.name != "tone":
            return {"AUC": auc(*self.preferences(items, answers))}
        texts = [answer.text for answer in answers]
        return {"perplexity of replies": perplexity(answerer.model, answerer.tokenizer, items, texts)}

    def prompted(self, items: Sequence[Item]) -> list[Item]:
        return [replace(item, prompt=small_world.prompt_with_tag(item.prompt)) for item in items]
