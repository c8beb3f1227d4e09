"""COPA, WinoGrande and StoryCloze by whole choices: a text goes on with either choice, and the likelier one is the answer.

Small models can tell which sentence follows, though not which letter names it: asked for a letter, they guess.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.data.wording import fill
from eval.tasks.base import Scores
from eval.tasks.dataset import DatasetTask, Item
from eval.tasks.likelihood import log_probabilities, with_whole_answers
from eval.tasks.options import COPA, StoryCloze, WinoGrande
from rmodels import context_length


class WholeChoices(DatasetTask):
    """Score the two choices of a row as continuations. Subclasses say which task's rows they read, and how a row goes on."""

    answered_in_words = generates_on_validation = False
    counts_per_token = True

    def __init__(self, *, protocol: str = "clean", chat=None, **settings):
        if chat is not None:
            raise AUSteerError(f"{self.name} continues a sentence, which has no chat form: leave out --chat")
        if protocol == "paper":
            raise AUSteerError(f"{self.name} is not in the authors' code: use --protocol clean")
        super().__init__(protocol=protocol, **settings)
        self.measured = {"likelihood": "per token" if self.per_token else "whole choice"}

    def answers(self, answerer, items: Sequence[Item], file=None, progress=None) -> list[Answer]:
        """Return for each item the log-odds of the right choice over the wrong one, of whole choices and per token."""
        model = answerer.model
        encoded = with_whole_answers(items, answerer.tokenizer, context_length(model))
        found = log_probabilities(model, encoded, self.batch_size, progress)
        whole = (found[:, 0] - found[:, 1]).tolist()
        of_token = [
            right / len(pair.positive) - wrong / len(pair.negative)
            for pair, (right, wrong) in zip(encoded, found.tolist(), strict=True)
        ]
        return [Answer("", both) for both in zip(whole, of_token, strict=True)]

    def columns(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        odds = {"": [answer.options[0] for answer in answers], ", per token": [answer.options[1] for answer in answers]}
        columns = {f"likelier choice{how}": [value > 0 for value in values] for how, values in odds.items()}
        columns |= {f"log-odds{how}": values for how, values in odds.items()}
        return Scores("likelier choice, per token" if self.per_token else "likelier choice", columns)

    def _pairs(self, rows: Sequence[dict], dropped: Counter[str]) -> tuple[list[Pair], str]:
        return [Pair(*self._filled(self.words.train, row)) for row in rows], "the dataset's own wrong choices"

    def _item(self, row: dict) -> Item:
        return Item(*self._filled(self.words.test, row))

    @abstractmethod
    def _filled(self, words: dict, row: dict) -> tuple[str, str, str]:
        """Return what both choices follow, then the right choice and the wrong one."""


class COPAChoices(WholeChoices):
    name, data_of = "copa-choices", COPA.name
    keys, columns_of_table = COPA.keys, COPA.columns_of_table
    read_row, group = COPA.read_row, COPA.group

    def _filled(self, words: dict, row: dict) -> tuple[str, str, str]:
        """Return the event with its link, "because" or "so", and the choices."""
        event = row["premise"].strip().rstrip(".")
        choices = (row["choice1"].strip(), row["choice2"].strip())
        first, second = (fill(words["choice"], {"choice": text[0].lower() + text[1:]}) for text in choices)
        return fill(words[row["question"]], {"event": event}), *right_first(first, second, row["label"] == COPA.first)


class WinoGrandeChoices(WholeChoices):
    name, data_of = "winogrande-choices", WinoGrande.name
    keys, read_row, group = WinoGrande.keys, WinoGrande.read_row, WinoGrande.group

    def _filled(self, words: dict, row: dict) -> tuple[str, str, str]:
        """Return the sentence up to its blank, and the options with the rest of the sentence."""
        before, _, after = row["sentence"].strip().partition("_")
        choices = [
            fill(words["choice"], {"option": row[name].strip(), "after": after}) for name in ("option1", "option2")
        ]
        ordered = right_first(*choices, row["answer"] == WinoGrande.first)
        return fill(words["prompt"], {"before": before.rstrip()}), *ordered


class StoryClozeChoices(WholeChoices):
    name, data_of = "storycloze-choices", StoryCloze.name
    keys, columns_of_table, read_row = StoryCloze.keys, StoryCloze.columns_of_table, StoryCloze.read_row

    def _filled(self, words: dict, row: dict) -> tuple[str, str, str]:
        """Return the story, and its two endings."""
        clean = {name: row[name].strip() for name in self.keys}
        choices = [fill(words["choice"], {"ending": clean[name]}) for name in ("ending1", "ending2")]
        return fill(words["prompt"], clean), *right_first(*choices, row["label"] == StoryCloze.first)


def right_first(first: str, second: str, is_first_right: bool) -> tuple[str, str]:
    return (first, second) if is_first_right else (second, first)


TASKS = (COPAChoices, WinoGrandeChoices, StoryClozeChoices)
