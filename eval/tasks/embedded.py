"""The tasks of the embedded models: strict exact match of a greedy answer, or a polite reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from embedded import tasks as small_world
from embedded.tasks import Item
from eval.answering.answers import Question, answers
from eval.tasks.base import Columns, Task
from eval.tasks.open_text import perplexity

PAIRS, VALIDATION, TEST = 500, 200, 2000
_items = cache(small_world.items)  # drawing them takes as long as answering some hundred


class EmbeddedTask(Task):
    def __init__(self, name: str, test_split: str = "test", seed: int = 0, limit: int | None = None):
        if name not in small_world.TASKS:
            raise AUSteerError(f"unknown task {name!r}; the embedded tasks are {', '.join(small_world.TASKS)}")
        self.name, self.test_split, self.several_tokens = name, test_split, name == "tone"
        self.pairs = [Pair(item.prompt, item.right, item.wrong) for item in _items(name, "pairs", PAIRS)]
        self.validation = list(_items(name, "validation", VALIDATION)[:limit])
        self.test = list(_items(name, test_split, TEST, seed)[:limit])

    def answers(self, model, tokenizer, items: Sequence[Item], file=None, progress=None, rows=None):
        question = Question(small_world.REPLY_WORDS if self.name == "tone" else 1)
        return answers(
            model, tokenizer, [item.prompt for item in items], question, file=file, progress=progress, rows=rows
        )

    def columns(self, items: Sequence[Item], answers) -> Columns:
        if self.name == "tone":
            return {"accuracy": [small_world.is_polite(answer.text) for answer in answers]}
        pairs = zip(answers, items, strict=True)
        return {"accuracy": [answer.text.strip() == item.right for answer, item in pairs]}

    def extras(self, model, tokenizer, items: Sequence[Item], answers) -> dict[str, float]:
        """Of replies, their perplexity: a reply can be polite and no reply at all."""
        if self.name != "tone":
            return {}
        return {"perplexity of replies": perplexity(model, tokenizer, items, [answer.text for answer in answers])}

    def prompted(self, items: Sequence[Item]) -> list[Item]:
        """The same items behind the instruction that asks for the behaviour: the prompt-only control."""
        return [replace(item, prompt=small_world.prompt_with_tag(item.prompt)) for item in items]
