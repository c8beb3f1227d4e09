"""BoolQ, COPA, WinoGrande and StoryCloze: the answer is one token, one of two options.

Strict exact match is the paper's measure: the one greedy token, stripped, in lower case, is the option. A model that
begins with a newline scores nothing, so two columns stand beside it: which option the model finds likelier over all
spellings, and whether the answer was an option at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.answering.answerer import Answerer, Generation, option_tokens
from eval.data import fields
from eval.data.wording import fill
from eval.decomposition import LIKELIER, Preferences, auc
from eval.tasks.base import Scores
from eval.tasks.dataset import DatasetTask, Item


class OptionTask(DatasetTask):
    new_tokens = {"": 1}
    label: str  # the row's field that says which option is right ...
    first: object  # ... and its value where the first one is

    def right(self, row: dict) -> int:
        return int(row[self.label] != self.first)

    def generation(self, answerer: Answerer, items: Sequence[Item]) -> Generation:
        options = option_tokens(answerer.tokenizer, self.words.test["options"], items[0].prompt)
        return Generation(self.tokens_for(answerer.model.config.model_type), options=options)

    def columns(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        options = [_plain(option) for option in self.words.test["options"]]
        golds = [_plain(item.gold) for item in items]
        words = [_plain(answer.text) for answer in answers]
        columns = {
            "exact match": [a == b for a, b in zip(words, golds, strict=True)],
            LIKELIER: self.preferences(items, answers).right,
            "an option at all": [word in options for word in words],
        }
        return Scores("exact match", columns)

    def preferences(self, items: Sequence[Item], answers: Sequence[Answer]) -> Preferences:
        first = _plain(self.words.test["options"][0])
        log_odds = [answer.options[0] - answer.options[1] for answer in answers]
        return Preferences(log_odds, [_plain(item.gold) == first for item in items])

    def extras(self, answerer: Answerer, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, float]:
        golds = [item.gold for item in items]
        majority = 100 * max(golds.count(option) for option in set(golds)) / len(golds)
        return {"majority, %": majority, "AUC": auc(*self.preferences(items, answers))}

    def _pairs(self, rows: Sequence[dict], dropped: Counter[str]) -> tuple[list[Pair], str]:
        prompt, options = self.words.train["prompt"], self.words.train["options"]
        filled = [fill(prompt, self._clean(row)) for row in rows]
        pairs = [Pair(text, *self._ordered(options, row)) for text, row in zip(filled, rows, strict=True)]
        return pairs, "the dataset's own wrong answers"

    def _item(self, row: dict) -> Item:
        return Item(fill(self.words.test["prompt"], self._clean(row)), *self._ordered(self.words.test["options"], row))

    def _ordered(self, options: Sequence[str], row: dict) -> tuple[str, str]:
        """Return the right option, then the wrong one."""
        return options[self.right(row)], options[1 - self.right(row)]

    def _clean(self, row: dict) -> dict:
        """Strip the fields of outer white space, as the authors fill them in."""
        return {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}


class BoolQ(OptionTask):
    name, label, first = "boolq", "answer", False
    keys = ("question", "passage")

    @classmethod
    def read_row(cls, raw):
        return {**fields.texts(raw, *cls.keys), "answer": fields.truth(raw, "answer", "label")}

    def group(self, row):
        return row["passage"]  # several questions share a passage


class COPA(OptionTask):
    name, label, first = "copa", "label", 0
    swaps_choices = True
    keys = ("premise", "question", "choice1", "choice2")
    columns_of_table = {0: "label", 2: "premise", 3: "question", 4: "choice1", 5: "choice2"}  # the authors', unnamed

    @classmethod
    def read_row(cls, raw):
        question = fields.label(raw, "question", "cause", "effect")
        texts = fields.texts(raw, "premise", "choice1", "choice2")
        label = fields.label(raw, "label", 0, 1)
        return {"premise": texts.pop("premise"), "question": question, **texts, "label": label}

    def group(self, row):
        return "\n".join(sorted((row["choice1"].strip(), row["choice2"].strip())))  # mirrored items share them

    def _ranking_rows(self):
        return self._with_swapped(self.split.ranking) if self.swapped_choices else self.split.ranking

    def _pairs(self, rows, dropped):
        pairs, by = super()._pairs(rows, dropped)
        return pairs, f"{by}, every item also with its choices swapped" if self.swapped_choices else by

    def _with_swapped(self, rows: Sequence[dict]) -> list[dict]:
        """Put before every row the same with its choices swapped, if that is no row yet: so the authors' log begins.

        The rows are those to rank by, split from the others before, so no copy gets to the validation or test items.
        """
        once = {}
        for row in rows:
            swapped = {"choice1": row["choice2"], "choice2": row["choice1"], "label": 1 - row["label"]}
            for one in ({**row, **swapped}, row):
                once.setdefault(self.text(one), one)
        return list(once.values())


class WinoGrande(OptionTask):
    name, label, first = "winogrande", "answer", "1"
    keys = ("sentence", "option1", "option2")

    @classmethod
    def read_row(cls, raw):
        twins = fields.text(raw, "qID", empty=True) if "qID" in raw else ""
        return {**fields.texts(raw, *cls.keys), "answer": fields.label(raw, "answer", "1", "2"), "qID": twins}

    def group(self, row):
        twin = row["qID"].rpartition("-")[0]  # two sentences that differ in a word have one id
        return twin or row["sentence"]


class StoryCloze(OptionTask):
    name, label, first = "storycloze", "label", 1
    keys = ("sent1", "sent2", "sent3", "sent4", "ending1", "ending2")
    columns_of_table = dict(enumerate(("id", *keys, "label")))

    @classmethod
    def read_row(cls, raw):
        return {**fields.texts(raw, *cls.keys), "label": fields.label(raw, "label", 1, 2)}

    def _clean(self, row):
        return row  # the authors strip nothing here


def _plain(text: str) -> str:
    return text.strip().lower()


TASKS = (BoolQ, COPA, WinoGrande, StoryCloze)
