"""Decide whether one of our numbers measures the same thing as the paper's, and describe what differs.

Both numbers always stand in the report. A difference between them stands there only where nothing differs.
"""

from __future__ import annotations

from functools import cache

from eval.data.read import read_catalogue

JUDGE = "gpt-5-mini"
KERNEL = "au_sdpa"  # the authors' models run transformers' default kernel
OUR_JUDGE_PROMPT = (
    "the judge's prompt is ours, not that of Liang et al. (Findings of EMNLP 2024, no. 171), which the paper uses"
)
OF_ANOTHER_PAPER = "the paper took the number from another paper"
ON_ANOTHER_MACHINE = "the paper's machine was another one"
RATED_BY_OTHERS = "other people rated other answers"


def differences(record: dict) -> list[str]:
    """Return in which ways a record was measured differently from the paper's number."""
    scorer, wording, protocol = record["measured"].get("scorer"), record["wording"], record["protocol"]
    reasons = []
    if scorer and scorer.partition(":")[0] != "perspective":
        reasons.append(f"toxicity is scored by {scorer} instead of Perspective")
    if not wording.startswith("authors:"):
        reasons.append("the prompts are not the authors'")
    elif "chat format" in wording:
        reasons.append("the prompts are in the model's chat format")
    if protocol != "paper":
        reasons.append(f"the protocol is {protocol} instead of the authors'")
    elif record["kernel"] != KERNEL:
        reasons.append(f"the attention kernel is {record['kernel'].removeprefix('au_')} instead of sdpa")
    if record["grid"] and len(record["grid"]) > 1 and record["search"] != "test":
        reasons.append("settings are chosen on validation items instead of the test split")
    n = _test_items(record["task"])
    if n and record["n"] != n:
        reasons.append("these are not all test items of the paper")
    return reasons


def judge_differences(verdicts: dict) -> list[str]:
    """Return in which ways a result of `main.py judge` differs from the paper's, apart from the judge's prompt."""
    reasons = []
    if not verdicts["judge"].startswith(JUDGE):
        reasons.append(f"the judge is {verdicts['judge']} instead of GPT-5-mini")
    if verdicts["orders"] != "one":
        reasons.append("the judge sees both orders instead of one")
    return reasons


@cache
def _test_items(task: str) -> int | None:
    """Return the number of test items in the paper, or None for other tasks."""
    entry = read_catalogue().get(task)
    return entry["splits"]["test"].get("paper") if entry else None
