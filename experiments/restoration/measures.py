"""Measure, beside the task, the perplexity of a model on text, and its zero-shot accuracies by lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError, missing_extra, one_line
from eval.tasks.open_text import token_losses

LM_EVAL_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of the texts, without the first token of each, which nothing predicts."""
    nats, tokens = token_losses(model, texts, [1] * len(texts))
    if not any(tokens):
        raise AUSteerError("perplexity needs a text of at least two tokens")
    return math.exp(sum(nats) / sum(tokens))


def check_lm_eval() -> None:
    """Raise an error that says how to install lm-eval if it is missing."""
    if find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "evaluation")


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str | dict], limit: int | None
) -> dict[str, dict[str, float]]:
    """Return {"accuracy", "stderr", "n"} of each task by lm-eval: no examples, plain accuracy (not acc_norm)."""
    check_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    try:
        results = simple_evaluate(wrapped, tasks=list(tasks), num_fewshot=0, limit=limit, bootstrap_iters=0)
    except Exception as error:  # no network, no such task, a data set behind a gate, ...: each library has types for it
        names = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
        raise AUSteerError(f"lm-eval could not run {names}: {one_line(error)[:200]}") from error
    counts, by_task = results["n-samples"], results["results"]
    if others := [name for name, scores in by_task.items() if "acc,none" not in scores or name not in counts]:
        raise AUSteerError(f"--lm-eval {' '.join(others)}: only single tasks that measure accuracy (acc) can be shown")
    return {
        name: {"accuracy": scores["acc,none"], "stderr": scores["acc_stderr,none"], "n": counts[name]["effective"]}
        for name, scores in by_task.items()
    }
