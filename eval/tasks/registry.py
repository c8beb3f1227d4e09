"""Find the paper's tasks, and yours, by reading this folder: a file offers its classes in a tuple TASKS."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from austeer.errors import AUSteerError, one_of
from eval import tasks
from eval.tasks.dataset import DatasetTask


def find_tasks() -> dict[str, type[DatasetTask]]:
    named: dict[str, type[DatasetTask]] = {}
    for file in pkgutil.iter_modules(tasks.__path__, f"{tasks.__name__}."):
        for task in getattr(import_module(file.name), "TASKS", ()):
            if task.name in named:
                raise AUSteerError(f"{file.name} offers a second task {task.name!r}; give it another name")
            named[task.name] = task
    return named


PAPER_TASKS = find_tasks()


def paper_task(
    name: str,
    *,
    toxicity: str = "local",
    cache: str | Path = "results/perspective.jsonl",
    device: str | None = None,
    **settings,
) -> DatasetTask:
    """Make a task. settings: keyword arguments of `DatasetTask`.

    toxicity: the scorer, for tasks that have one. cache: the file of Perspective's answers. device: the local scorer's.
    """
    return one_of(PAPER_TASKS, name, "task").build(toxicity, cache, device, **settings)
