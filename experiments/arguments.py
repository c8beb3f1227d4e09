"""Command-line options that main.py, restore and others share, and the checks of their combinations."""

from __future__ import annotations

import argparse

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError
from embedded.tasks import TASKS
from eval.tasks.registry import PAPER_TASKS
from experiments.cell import EMBEDDED


def parents() -> list[argparse.ArgumentParser]:
    """Return parsers of the shared options: the model, a task or pairs, and how answers are generated and scored."""
    options = arguments.parent()
    add = options.add_argument
    add("--data_name", default="all", choices=["all", *dict.fromkeys((*TASKS, *PAPER_TASKS))], metavar="TASK",
        help=f"for the embedded models one of {', '.join(TASKS)} (default: all of them); for other models one of "
        f"{', '.join(PAPER_TASKS)}")  # fmt: skip
    add(
        "--test_split",
        default="test",
        choices=["test", "test2"],
        help="test split of the embedded tasks (default: test)",
    )
    add("--limit", type=int, help="use at most this many validation and test items, for a quick look")
    add("--data-dir", help="folder of the paper's datasets (default: datasets/, then the hub)")
    add("--toxicity", default="local", metavar="SCORER",
        help="scorer of toxicity: local[:MODEL[:LABEL]] (default), embedded, perspective[:first-span]")  # fmt: skip
    add("--chat", action="store_true", help="put prompts into the model's chat format")
    add("--results", default="results", help="folder for records and tables (default: %(default)s)")
    model = "embedded (default), a hub id, the folder of a checkpoint, or a GGUF file"
    return [
        arguments.model_options(required=False, default=EMBEDDED, help=model),
        arguments.pairs_options(required=False),
        options,
    ]


def check(args: argparse.Namespace, *positive: str) -> None:
    """Refuse a model without a task, and counts below 1: --limit and the options named in `positive`."""
    for name in ("limit", *positive):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AUSteerError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.model == EMBEDDED and args.weights:
        raise AUSteerError("--weights needs --model, the name of the model that they belong to")
    if args.model == EMBEDDED and args.pairs:
        raise AUSteerError("--pairs needs --model: the embedded models only know their own tasks")
    if args.model == EMBEDDED and args.data_name not in ("all", *TASKS):
        raise AUSteerError(f"the embedded models' tasks are {', '.join(TASKS)}: for {args.data_name}, give --model")
    if args.model != EMBEDDED and not args.pairs and args.data_name not in PAPER_TASKS:
        raise AUSteerError(
            f"--model needs --data_name, one of {', '.join(PAPER_TASKS)}, or --pairs, a file of contrastive pairs"
        )
    rmodels.check_device(args.device)


def task_names(args: argparse.Namespace) -> list[str]:
    """Return the names of the requested tasks; of the user's own pairs, their file."""
    if args.model == EMBEDDED:
        return [name for name in TASKS if args.data_name in ("all", name)]
    return [args.pairs or args.data_name]
