"""A task: pairs to rank by, validation items to choose by, a test split, and how answers are scored.

A task is run in three steps: `answers` asks an answerer, steered or not; `columns` scores the answers item by item;
`extras` computes what only the whole set of answers can show. Tasks know no method, and do not change once they are made.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.answerer import Answerer, Generation
from eval.data.similar import general_pairs
from eval.decomposition import Preferences
from eval.tasks.splits import drawn


@dataclass(frozen=True)
class Scores:
    """Hold a value per item for each measure, True or False if answers are right or wrong. Grid points are chosen by `main`."""

    main: str
    columns: dict[str, list[float]]

    @property
    def outcomes(self) -> list[float]:
        return self.columns[self.main]


class PairSet(NamedTuple):
    pairs: list[Pair]
    groups: list[str]  # a name per pair: pairs of one group give each other away
    by: str = "the task's own wrong answers"  # how the wrong answers were made
    dropped: dict[str, int] = {}  # rows that make no pair, by reason
    left_over: list[Pair] = []  # of groups that none of `pairs` is of


class Task(ABC):
    name: str
    test_split: str
    validation: list
    test: list
    wording = "the task's own"  # whose prompts these are
    multi_token = False  # an answer takes many passes: then a small batch costs nearly as much as a large one
    generates_on_validation = True  # False: settings are chosen by likelihoods, and only the test is answered in words
    answered_in_words = True  # False: by likelihoods of the loaded model alone
    swaps_choices = False  # its pairs can also be made with the choices swapped
    measured: dict = {}  # how answers are made and scored, where that can be chosen
    batch_size: int | None = None

    def __init__(
        self,
        *,
        n_pairs: int | None = None,
        pairs_draw: int | None = None,
        general_pairs: bool = False,
        encoder: str | None = None,
        swapped_choices: bool = False,
    ):
        """Set how pairs are made.

        n_pairs: use only the first n pairs. pairs_draw: instead draw n at random with this seed, keeping groups whole.
        general_pairs: make wrong answers by the paper's general recipe. encoder: finds similar answers. swapped_choices: make a second pair of every item, with its choices swapped.
        """
        if swapped_choices and not self.swaps_choices:
            raise AUSteerError("swapped choices are for the pairs of copa only: leave out --swapped-choices")
        if pairs_draw is not None and n_pairs is None:
            raise AUSteerError("a draw needs the number of pairs to draw: add --n-pairs")
        self.n_pairs, self.pairs_draw = n_pairs, pairs_draw
        self.general_pairs, self.encoder = general_pairs, encoder
        self.swapped_choices = swapped_choices

    @abstractmethod
    def own_pairs(self) -> PairSet:
        """Return the pairs that the task itself makes."""

    @cached_property
    def _pair_set(self) -> PairSet:
        pairs, groups, by, dropped, _ = self.own_pairs()
        if self.general_pairs:
            pairs, by = general_pairs(pairs, self.encoder)
        chosen = self._chosen(groups)
        names = {groups[index] for index in chosen}
        left_over = [pair for pair, group in zip(pairs, groups, strict=True) if group not in names]
        return PairSet([pairs[i] for i in chosen], [groups[i] for i in chosen], by, dropped, left_over)

    def _chosen(self, groups: list[str]) -> Sequence[int]:
        """Return the indices of the pairs to use."""
        if self.pairs_draw is None:
            return range(len(groups))[: self.n_pairs]
        if self.n_pairs >= len(groups):
            raise AUSteerError(
                f"{self.name} has {len(groups)} pairs, so every draw of {self.n_pairs} is the same: give a smaller --n-pairs"
            )
        return drawn(groups, self.n_pairs, self.pairs_draw)

    @property
    def pairs(self) -> list[Pair]:
        return self._pair_set.pairs

    @property
    def groups(self) -> list[str]:
        """Return the name of each pair's group: folds and draws take groups whole."""
        return self._pair_set.groups

    @property
    def left_over(self) -> list[Pair]:
        """Return the pairs that are not used, nor any of their group: what options of methods may be chosen on."""
        return self._pair_set.left_over

    @property
    def pairs_by(self) -> str:
        return self._pair_set.by

    @property
    def dropped(self) -> dict[str, int]:
        return self._pair_set.dropped

    def generation(self, answerer: Answerer, items: Sequence) -> Generation:
        """Return how answers to these items are generated."""
        raise NotImplementedError(f"{self.name} is not answered in words")

    def answers(
        self, answerer: Answerer, items: Sequence, file: AnswerFile | None = None, progress: str | None = None
    ) -> list[Answer]:
        """Return the answer to each item. file: keeps them as they come. progress: the title of a bar."""
        prompts, generation = [item.prompt for item in items], self.generation(answerer, items)
        return answerer.answer(prompts, generation, batch_size=self.batch_size, file=file, progress=progress)

    def prompted(self, items: Sequence) -> list:
        """Return the same items with an instruction in front that asks for the behaviour, for tasks that have one."""
        raise NotImplementedError(f"{self.name} has no instruction")

    @abstractmethod
    def columns(self, items: Sequence, answers: Sequence[Answer]) -> Scores: ...

    def preferences(self, items: Sequence, answers: Sequence[Answer]) -> Preferences | None:
        """Return which of the two options each answer prefers; None for tasks whose answers are not one of two words."""
        return None

    def extras(self, answerer: Answerer, items: Sequence, answers: Sequence[Answer]) -> dict[str, float]:
        """Return figures of the whole set of answers. The model is not steered here."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        return items_hash([*self.validation, *self.test])


def items_hash(items: Sequence) -> str:
    """Hash all fields of all items: a change of an item or of its wording makes another question."""
    return hashlib.sha256(json.dumps([list(map(str, _fields(item))) for item in items]).encode()).hexdigest()


def _fields(item) -> list:
    return list(item) if isinstance(item, tuple) else list(vars(item).values())
