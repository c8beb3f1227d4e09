"""SVAMP, MAWPS and GSM8K: the answer is a number, with its steps or without.

Wrong answers of pairs are the most similar other right answers (appendix B.1). clean: another number. paper: as the
authors' code, the nearest answer, or white space where that is the same text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import nan

from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.answering.answerer import Answerer, Generation, up_to
from eval.data import fields
from eval.data.similar import Similarity
from eval.data.wording import fill
from eval.scoring.numbers import TOLERANCE, authors_number, authors_trim, robust_number, same_number
from eval.tasks.base import Scores
from eval.tasks.dataset import DatasetTask, Item


class NumberTask(DatasetTask):
    trigger: str  # where the authors cut an answer
    stop: str  # where an answer has ended, or has begun to ask itself the next question

    def generation(self, answerer: Answerer, items: Sequence[Item]) -> Generation:
        # the authors let every answer run to its full length
        stop = None if self.protocol == "paper" else self.stop
        return Generation(self.tokens_for(answerer.model.config.model_type), stop=stop)

    def columns(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        # answers that run to their full length go on with questions of their own, which the robust reader skips
        robust = [robust_number(up_to(answer.text, self.stop)) for answer in answers]
        theirs = [authors_number(authors_trim(answer.text, self.trigger)) for answer in answers]
        golds = [(robust_number(item.gold), authors_number(item.gold)) for item in items]
        right = {
            "right number": [same_number(a, gold) for a, (gold, _) in zip(robust, golds, strict=True)],
            # compared exactly; an answer without a number is wrong
            "right number, authors' rule": [
                a is not None and a == gold for a, (_, gold) in zip(theirs, golds, strict=True)
            ],
        }
        if self.protocol == "paper":
            right = dict(reversed(right.items()))
        columns = {**right, "a number at all": [number is not None for number in robust]}
        return Scores(next(iter(right)), columns)

    def extras(self, answerer: Answerer, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, float]:
        """Return how many of the numbers that are given are right."""
        columns = self.columns(items, answers).columns
        given = [
            right for right, number in zip(columns["right number"], columns["a number at all"], strict=True) if number
        ]
        return {"right, given a number, %": 100 * sum(given) / len(given) if given else nan}

    def _pairs(self, rows: Sequence[dict], dropped: Counter[str]) -> tuple[list[Pair | None], str]:
        prompts = [fill(self.words.train["prompt"], _with_number(row)) for row in rows]
        # the ranking rows come first in the pool
        pool = [fill(self.words.train["answer"], _with_number(row)) for row in self._pool()]
        similarity = Similarity(self.encoder)
        if self.protocol == "paper":
            nearest = similarity.nearest(pool)
            wrong = [pool[j] if pool[j] != pool[i] else self.words.train["missing"] for i, j in enumerate(nearest)]
        else:
            numbers = [robust_number(text) for text in pool]
            values = [nan if number is None else number for number in numbers]
            nearest = similarity.nearest_different(pool, values, TOLERANCE)
            dropped["no different number in the pool"] += nearest.count(None)
            wrong = [None if j is None else pool[j] for j in nearest]
        three = zip(prompts, pool, wrong, strict=False)
        pairs = [None if other is None else Pair(prompt, right, other) for prompt, right, other in three]
        return pairs, f"most similar other answer, by {similarity.name}"

    def _pool(self) -> Sequence[dict]:
        return self.split.pool

    def _item(self, row: dict) -> Item:
        row = _with_number(row)
        return Item(fill(self.words.test["prompt"], row), fill(self.words.test["answer"], row))


class SVAMP(NumberTask):
    name, trigger, stop = "svamp", "Answer", r"(?i)\n\s*question:"
    keys = ("body", "question")
    new_tokens = {"": 5, "llama": 50, "qwen3": 100, "qwen3_moe": 100}

    @classmethod
    def read_row(cls, raw):
        return {
            "body": fields.text(raw, "body", "Body"),
            "question": fields.text(raw, "question", "Question"),
            "answer": fields.number(raw, "answer", "Answer"),
        }

    def tokens_for(self, family):
        # five tokens, the authors' length for Gemma, cut numbers of more than four digits
        return super().tokens_for(family) if self.protocol == "paper" else 50


class _WithSteps(NumberTask):
    trigger, stop = "####", r"(?i)####[^\n]*\d[^\n]*\n|\n\s*question:"
    keys = ("question",)


class MAWPS(_WithSteps):
    name = "mawps"
    new_tokens = {"": 250, "qwen3": 150, "qwen3_moe": 150}

    @classmethod
    def read_row(cls, raw):
        return {"question": fields.text(raw, "question"), "answer": fields.steps(raw, "answer_steps", "answer")}


class GSM8K(_WithSteps):
    name = "gsm8k"
    new_tokens = {"": 400}

    @classmethod
    def read_row(cls, raw):
        return {"question": fields.text(raw, "question"), "answer": fields.steps(raw, "answer")}

    def _pool(self):
        # the authors embed the first thousand answers of the 7,473
        return self.split.pool[:1000]


def _with_number(row: dict) -> dict:
    """Add {number}: SVAMP's answers are floats, so {answer} is 145.0, as the authors print it, and {number} is 145."""
    answer = row["answer"]
    return {**row, "number": f"{answer:.10g}" if isinstance(answer, float) else answer}


TASKS = (SVAMP, MAWPS, GSM8K)
