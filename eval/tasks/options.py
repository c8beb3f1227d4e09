"""BoolQ, COPA, WinoGrande and StoryCloze: one token answers, out of two options.

Strict exact match is the paper's measure: the one greedy token, stripped, in lower case, is the option. A
model that begins with a newline scores nothing, so three columns stand beside it: which option the model
finds likelier over all spellings, and whether the answer was an option at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.answering.answers import Question, answers, option_tokens
from eval.data.wording import fill
from eval.tasks.base import Columns
from eval.tasks.dataset import DatasetTask, Item


class OptionTask(DatasetTask):
    new_tokens = {"": 1}
    label: str  # the row's field that says which option is right ...
    first: object  # ... and its value where the first one is

    def right(self, row: dict) -> int:
        return int(row[self.label] != self.first)

    def answers(self, model, tokenizer, items: Sequence[Item], file=None, progress=None):
        options = option_tokens(tokenizer, self.words.test["options"], items[0].prompt)
        question = Question(self.tokens_for(model.config.model_type), options=options)
        prompts = [item.prompt for item in items]
        return answers(model, tokenizer, prompts, question, batch_size=self.batch_size, file=file, progress=progress)

    def columns(self, items: Sequence[Item], answers: Sequence[Answer]) -> Columns:
        options = [_plain(option) for option in self.words.test["options"]]
        golds = [_plain(item.gold) for item in items]
        said = [_plain(answer.text) for answer in answers]
        likelier = [options[max(range(len(options)), key=answer.options.__getitem__)] for answer in answers]
        return {
            "exact match": [a == b for a, b in zip(said, golds, strict=True)],
            "likelier option": [a == b for a, b in zip(likelier, golds, strict=True)],
            "an option at all": [answer in options for answer in said],
        }

    def extras(self, model, tokenizer, items: Sequence[Item], answers) -> dict[str, float]:
        golds = [item.gold for item in items]
        return {"majority, %": 100 * max(golds.count(option) for option in set(golds)) / len(golds)}

    def _pairs(self, rows: Sequence[dict]) -> list[Pair]:
        prompt, options = self.words.train["prompt"], self.words.train["options"]
        filled = [fill(prompt, self._clean(row)) for row in rows]
        return [Pair(text, *self._ordered(options, row)) for text, row in zip(filled, rows, strict=True)]

    def _item(self, row: dict) -> Item:
        return Item(fill(self.words.test["prompt"], self._clean(row)), *self._ordered(self.words.test["options"], row))

    def _ordered(self, options: Sequence[str], row: dict) -> tuple[str, str]:
        """The right one first."""
        return options[self.right(row)], options[1 - self.right(row)]

    def _clean(self, row: dict) -> dict:
        """Fields without outer white space, as the authors fill them in."""
        return {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}


class BoolQ(OptionTask):
    name, label, first = "boolq", "answer", False

    def group(self, row):
        return row["passage"]  # several questions are asked of a passage


class COPA(OptionTask):
    name, label, first = "copa", "label", 0

    def group(self, row):
        return "\n".join(sorted((row["choice1"].strip(), row["choice2"].strip())))  # mirrored items share them


class WinoGrande(OptionTask):
    name, label, first = "winogrande", "answer", "1"

    def group(self, row):
        twin = row["qID"].rpartition("-")[0]  # two sentences that differ in a word have one id
        return twin or row["sentence"]


class StoryCloze(OptionTask):
    name, label, first = "storycloze", "label", 1

    def _clean(self, row):
        return row  # here they strip nothing


def _plain(text: str) -> str:
    return text.strip().lower()
