"""What a task is: pairs to rank by, validation items to choose by, a test split, and how answers are scored.

A cell asks in three steps: `answers` runs the model as it is given, steered or not; `columns` scores the
answers item by item, the measure that settings are chosen by first; `extras` says what only the whole set
can say. Tasks know no method.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.pairs import Pair
from eval.answering.answer_file import Answer, AnswerFile

Columns = dict[str, list[float]]  # by measure, a value an item; True and False for what is right or wrong


class Task(ABC):
    name: str
    test_split: str
    pairs: list[Pair]
    validation: list
    test: list
    wording = "the task's own"  # whose prompts these are
    pairs_by = "the task's own wrong answers"  # known once pairs are made
    several_tokens = False  # an answer takes many passes: then a small batch costs nearly as much as a large one
    speaks_on_validation = True  # False: settings are chosen by likelihoods, and only the test is answered in words
    measured: dict = {}  # how answers are made and scored, where that can be chosen

    @abstractmethod
    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence,
        file: AnswerFile | None = None,
        progress: str | None = None,
        rows: Callable[[list[int]], None] | None = None,
    ) -> list[Answer]:
        """rows: of tasks with several tokens, see `eval.answering.answers`."""

    def prompted(self, items: Sequence) -> list:
        """The same items behind an instruction that asks for the behaviour, for tasks that have one."""
        raise NotImplementedError(f"{self.name} has no instruction")

    @abstractmethod
    def columns(self, items: Sequence, answers: Sequence[Answer]) -> Columns: ...

    def extras(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence, answers: Sequence[Answer]
    ) -> dict[str, float]:
        """Figures of the whole set of answers. The model is not steered here."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        return items_hash([*self.validation, *self.test])


def items_hash(items: Sequence) -> str:
    """Of everything asked: a change of an item or of its wording is another question."""
    return hashlib.sha256(json.dumps([list(map(str, _fields(item))) for item in items]).encode()).hexdigest()


def _fields(item) -> list:
    return list(item) if isinstance(item, tuple) else list(vars(item).values())
