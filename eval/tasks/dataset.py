"""A task on a dataset: rows, wording and protocol become pairs and items.

A task is one file in this folder; docs/tasks.md shows one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from austeer.chat import chat_prompts, pairs_in_chat
from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.answering.answerer import Answerer, Generation
from eval.data.read import read_rows
from eval.data.rows import RowSource
from eval.data.wording import Wording, fill, read_wording
from eval.tasks.base import PairSet, Task
from eval.tasks.splits import Split, split


class Item(NamedTuple):
    prompt: str
    gold: str  # the right option or number; empty where the answer is open
    wrong: str = ""  # where there is a wrong answer to compare with


class DatasetTask(RowSource, Task):
    """Make pairs and items from rows. Subclasses say what a row is, what it becomes, and how answers are scored."""

    new_tokens: ClassVar[dict[str, int]]  # by model family, "" for all others; the authors' lengths
    templates: ClassVar[dict | None] = None  # wording like that of datasets/wording.json, for tasks not listed there
    test_split = "test"
    counts_per_token = False  # whether likelihoods of its answers may be taken per token

    def __init__(
        self,
        *,
        data_dir: str | Path | None = None,
        protocol: str = "clean",
        chat: PreTrainedTokenizerBase | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        per_token: bool = False,
        **ranking,
    ):
        """Read and split the rows. per_token: compare likelihoods of answers per token. ranking: see `Task`."""
        super().__init__(**ranking)
        if per_token and not self.counts_per_token:
            raise AUSteerError(f"{self.name} does not compare likelihoods of whole answers: leave out --per-token")
        self.per_token = per_token
        data_dir = Path(data_dir) if data_dir else None
        self.protocol, self.chat = protocol, chat
        if chat is not None and protocol == "paper":
            raise AUSteerError("the paper protocol uses no chat template; leave --chat out, or use --protocol clean")
        self.batch_size = 1 if protocol == "paper" else batch_size  # the authors answer one by one
        self.words: Wording = read_wording(self.name, data_dir, self.templates)
        self.wording = self.words.label + (", in the model's chat format" if chat else "")
        self.split = self._split(read_rows(type(self), "train", data_dir), read_rows(type(self), "test", data_dir))
        self._plain: dict[str, str] = {}  # the prompts of items as they were before the chat format
        self.validation = self._items(self.split.validation[:limit])
        self.test = self._items(self.split.test[:limit])

    @classmethod
    def build(cls, toxicity: str, cache: str | Path, device: str | None, **settings) -> DatasetTask:
        """Make the task from what a command line has. toxicity, cache, device: for tasks with a toxicity scorer."""
        return cls(**settings)

    def own_pairs(self) -> PairSet:
        """Make pairs from the ranking rows. What cannot be a pair is left out, and counted."""
        dropped = Counter({why: n for why, n in self.split.dropped.items() if n})
        rows = self._ranking_rows()
        made, by = self._pairs(rows, dropped)
        kept = [(pair, self.group(row)) for pair, row in zip(made, rows, strict=True) if self._keeps(pair, dropped)]
        if not kept:
            why = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
            raise AUSteerError(f"{self.name}: no pairs could be made of {len(self.split.ranking)} rows ({why})")
        pairs, groups = map(list, zip(*kept, strict=True))
        return PairSet(pairs_in_chat(self.chat, pairs) if self.chat else pairs, groups, by, dropped)

    def prompted(self, items: Sequence[Item]) -> list[Item]:
        """Return the same items with an instruction in front that asks for the behaviour: the prompt-only control."""
        instructed = [f"{self.words.instruction}\n\n{self._plain[item.prompt]}" for item in items]
        return [item._replace(prompt=prompt) for item, prompt in zip(items, self._in_chat(instructed), strict=True)]

    def generation(self, answerer: Answerer, items: Sequence[Item]) -> Generation:
        return Generation(self.tokens_for(answerer.model.config.model_type))

    def tokens_for(self, family: str) -> int:
        return self.new_tokens.get(family, self.new_tokens[""])

    def text(self, row: dict) -> str:
        """Return the text that identifies a row: rows of equal text are one item."""
        return "\n".join(row[key] for key in self.keys)

    def group(self, row: dict) -> str:
        """Return the name of the row's group: rows of one group give each other away, and stay on one side."""
        return self.text(row)

    def _ranking_rows(self) -> list[dict]:
        return self.split.ranking

    def _keeps(self, pair: Pair | None, dropped: Counter[str]) -> bool:
        return pair is not None and (self.protocol == "paper" or _is_pair(pair, dropped))

    def _pairs(self, rows: Sequence[dict], dropped: Counter[str]) -> tuple[list[Pair | None], str]:
        """Return a pair per row, and how wrong answers were made; None where a row makes no pair, counted in `dropped`.

        This is for tasks whose rows have both answers.
        """
        parts = ("prompt", "positive", "negative")
        pairs = [Pair(*(fill(self.words.train[part], row) for part in parts)) for row in rows]
        return pairs, "the dataset's own wrong answers"

    @abstractmethod
    def _item(self, row: dict) -> Item: ...

    def _split(self, train: list[dict], test: list[dict]) -> Split:
        return split(train, test, self.protocol, self.text, self.group)

    def _items(self, rows: Sequence[dict]) -> list[Item]:
        items = [self._item(row) for row in rows]
        prompts = self._in_chat([item.prompt for item in items])
        self._plain |= {prompt: item.prompt for prompt, item in zip(prompts, items, strict=True)}
        return [
            item._replace(prompt=prompt, **self._bare(gold=item.gold, wrong=item.wrong))
            for item, prompt in zip(items, prompts, strict=True)
        ]

    def _in_chat(self, prompts: list[str]) -> list[str]:
        return chat_prompts(self.chat, prompts) if self.chat else prompts

    def _bare(self, **answers: str) -> dict[str, str]:
        """Drop the space that follows a prompt: in a chat an answer begins its turn."""
        return {name: text.lstrip() for name, text in answers.items()} if self.chat else answers


def _is_pair(pair: Pair, dropped: Counter[str]) -> bool:
    reason = None
    if not pair.positive.strip() or not pair.negative.strip():
        reason = "an empty answer"
    elif pair.positive.strip() == pair.negative.strip():
        reason = "equal answers"
    if reason:
        dropped[reason] += 1
    return reason is None
