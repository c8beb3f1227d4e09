"""Many plans in one batch: the answers to a few prompts under every plan of a grid, each row steered by its own.

Token by token, a small batch costs nearly as much as a large one, and a grid asks for the same few prompts again and
again: for answers of several tokens this pays up to `FEW` prompts, for answers of one token it gains little
(python benchmarks/search.py --only batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answer_file import Answer
from eval.answering import Question, answers
from plan import Plan
from set_MFU import steer

FEW = 25


def answers_by_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    question: Question,
    plans: Sequence[Plan],
) -> list[list[Answer]]:
    """For each plan the answers to all prompts, by whichever way is faster."""
    if question.new_tokens == 1 or len(prompts) > FEW:
        return one_by_one(model, tokenizer, prompts, question, plans)
    return together(model, tokenizer, prompts, question, plans)


def one_by_one(model, tokenizer, prompts, question, plans) -> list[list[Answer]]:
    found = []
    for plan in plans:
        with steer(model, plan):
            found.append(answers(model, tokenizer, prompts, question))
    return found


def together(model, tokenizer, prompts, question, plans) -> list[list[Answer]]:
    with ExitStack() as steered:

        def steer_rows(indices: list[int]) -> None:
            steered.close()
            steered.enter_context(steer(model, [plans[index // len(prompts)] for index in indices]))

        found = answers(model, tokenizer, [*prompts] * len(plans), question, rows=steer_rows)
    return [found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))]
