"""The paper's tasks by name. A new one is a class with its texts, pairs and scores, and a line here."""

from __future__ import annotations

from pathlib import Path

from eval.scoring.toxicity import scorer
from eval.tasks.arithmetic import GSM8K, MAWPS, SVAMP
from eval.tasks.dataset import DatasetTask
from eval.tasks.open_text import BPO, Toxicity
from eval.tasks.options import COPA, BoolQ, StoryCloze, WinoGrande

PAPER_TASKS = {task.name: task for task in (BoolQ, COPA, WinoGrande, StoryCloze, SVAMP, MAWPS, GSM8K, Toxicity, BPO)}


def paper_task(
    name: str, toxicity: str, cache: str | Path = "results/perspective.jsonl", device: str | None = None, **settings
) -> DatasetTask:
    """cache: of Perspective's answers. device: of a local toxicity classifier."""
    if name == Toxicity.name:
        return Toxicity(scorer(toxicity, cache, device), **settings)
    return PAPER_TASKS[name](**settings)
