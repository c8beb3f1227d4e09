"""A task of the paper on its dataset: rows, wording and protocol become pairs and items."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.answering.answers import chat_prompts
from eval.data.read import read_rows
from eval.data.rows import KEYS
from eval.data.similar import Similarity
from eval.data.wording import Wording, fill, read_wording
from eval.tasks.base import Task
from eval.tasks.splits import split


class Item(NamedTuple):
    prompt: str
    gold: str  # the right option or number; empty where the answer is open
    wrong: str = ""  # where there is a wrong answer to compare with


class DatasetTask(Task):
    """Subclasses say what a row's text is, how it makes a pair, and how answers are scored."""

    name: ClassVar[str]
    new_tokens: ClassVar[dict[str, int]]  # by model family, "" for all others; the authors' lengths
    test_split = "test"
    pairs_by = "the dataset's own wrong answers"  # known once pairs are made

    def __init__(
        self,
        data_dir: str | Path | None = None,
        protocol: str = "clean",
        encoder: str | None = None,
        chat: PreTrainedTokenizerBase | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
    ):
        data_dir = Path(data_dir) if data_dir else None
        self.protocol, self.encoder, self.chat = protocol, encoder, chat
        if chat is not None and protocol == "paper":
            raise AUSteerError("the paper protocol uses no chat template; leave --chat out, or use --protocol clean")
        self.batch_size = 1 if protocol == "paper" else batch_size  # the authors answer one by one
        self.words: Wording = read_wording(self.name, data_dir)
        self.wording = self.words.label + (", in the model's chat format" if chat else "")
        self.split = self._split(read_rows(self.name, "train", data_dir), read_rows(self.name, "test", data_dir))
        self._plain: dict[str, str] = {}  # the prompts of items as they were before the chat format
        self.dropped: Counter[str] = Counter({why: n for why, n in self.split.dropped.items() if n})
        self.validation = self._items(self.split.validation[:limit])
        self.test = self._items(self.split.test[:limit])

    @cached_property
    def pairs(self) -> list[Pair]:
        """Of the ranking rows. What cannot be a pair is left out, and counted in `dropped`."""
        made = self._pairs(self.split.ranking)
        if self.protocol == "clean":
            made = [pair for pair in made if self._is_pair(pair)]
        if not made:
            why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise AUSteerError(f"{self.name}: no pairs could be made of {len(self.split.ranking)} rows ({why})")
        prompts = self._in_chat([pair.prompt for pair in made])
        return [pair._replace(prompt=prompt, **self._bare(pair)) for pair, prompt in zip(made, prompts, strict=True)]

    def prompted(self, items: Sequence[Item]) -> list[Item]:
        """The same items behind an instruction that asks for the behaviour: the prompt-only control."""
        told = [f"{self.words.instruction}\n\n{self._plain[item.prompt]}" for item in items]
        return [item._replace(prompt=prompt) for item, prompt in zip(items, self._in_chat(told), strict=True)]

    def tokens_for(self, family: str) -> int:
        return self.new_tokens.get(family, self.new_tokens[""])

    def text(self, row: dict) -> str:
        """What makes a row this row: equal texts are one item."""
        return "\n".join(row[key] for key in KEYS[self.name])

    def group(self, row: dict) -> str:
        """Rows of one group tell of each other, and stay on one side."""
        return self.text(row)

    @abstractmethod
    def _pairs(self, rows: Sequence[dict]) -> list[Pair]: ...

    @abstractmethod
    def _item(self, row: dict) -> Item: ...

    def _split(self, train: list[dict], test: list[dict]):
        return split(train, test, self.protocol, self.text, self.group)

    def _items(self, rows: Sequence[dict]) -> list[Item]:
        items = [self._item(row) for row in rows]
        prompts = self._in_chat([item.prompt for item in items])
        self._plain |= {prompt: item.prompt for prompt, item in zip(prompts, items, strict=True)}
        return [
            item._replace(
                prompt=prompt, **({"gold": item.gold.lstrip(), "wrong": item.wrong.lstrip()} if self.chat else {})
            )
            for item, prompt in zip(items, prompts, strict=True)
        ]

    def _in_chat(self, prompts: list[str]) -> list[str]:
        return chat_prompts(self.chat, prompts) if self.chat else prompts

    def _bare(self, pair: Pair) -> dict[str, str]:
        """In a chat an answer begins its turn: the space that would follow a prompt goes."""
        return {"positive": pair.positive.lstrip(), "negative": pair.negative.lstrip()} if self.chat else {}

    def _is_pair(self, pair: Pair) -> bool:
        reason = None
        if not pair.positive.strip() or not pair.negative.strip():
            reason = "an empty answer"
        elif pair.positive.strip() == pair.negative.strip():
            reason = "equal answers"
        if reason:
            self.dropped[reason] += 1
        return reason is None

    def _fill(self, row: dict) -> Pair:
        """For tasks whose rows have both answers."""
        return Pair(*(fill(self.words.train[part], row) for part in ("prompt", "positive", "negative")))

    def _similarity(self) -> Similarity:
        similarity = Similarity(self.encoder)
        self.pairs_by = f"most similar other answer, by {similarity.name}"
        return similarity
