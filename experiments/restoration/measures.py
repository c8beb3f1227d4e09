"""What is measured on every row beside the task: perplexity of text, and zero-shot accuracies by lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError, missing_extra, one_line
from austeer.forward import input_device
from austeer.pruning.blocks import same_length_batches

TOKENS_AT_ONCE = 1024  # tokens whose logits are in memory together
LM_EVAL_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of all tokens but the first of each text."""
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise AUSteerError("perplexity needs a text of at least two tokens")
    loss, count = 0.0, 0
    for batch in same_length_batches(texts, TOKENS_AT_ONCE):
        ids = torch.tensor([texts[index] for index in batch], device=input_device(model))
        logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss -= float(logp.gather(2, ids[:, 1:, None].to(logp.device)).double().sum())
        count += ids[:, 1:].numel()
    return math.exp(loss / count)


def check_lm_eval() -> None:
    """Refuse zero-shot accuracies where lm-eval is not installed."""
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
