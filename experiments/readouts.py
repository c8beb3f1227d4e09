"""Show where a model has skill to steer: what the unsteered model gets right, task by task, by every way of reading its answer.

python main.py readouts --model M --data-dir DIR
python main.py readouts --model M --data-dir DIR --task copa winogrande --limit 200

A gain needs room: where the unsteered model is at chance by every reading, steering has nothing to bring out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from austeer import arguments
from austeer.errors import AUSteerError
from austeer.files import write_text
from eval.decomposition import LIKELIER, UNBIASED
from eval.statistics import summary
from eval.tasks.open_text import log_odds_per_token
from eval.tasks.options import OptionTask
from eval.tasks.registry import PAPER_TASKS
from eval.tasks.whole_choices import WholeChoices
from experiments.bench import BENCHES
from experiments.cell import cell_of
from experiments.report import with_interval
from experiments.run_cell import run_cell
from experiments.store import Store
from rmodels import check_device

WORDS = {"exact match": "word for word", LIKELIER: "likelier option", UNBIASED: "likelier option, offset removed"}
CHOICES = {"likelier choice": "whole choice", "likelier choice, per token": "whole choice, per token"}
OPEN = ("toxicity", "bpo")  # what is preferred of the two answers of a pair; nothing else can be right here
TASKS = ("boolq", "copa", "copa-choices", "winogrande", "winogrande-choices", *OPEN)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    check_device(args.device)
    store = Store(records=str(Path(args.results) / "records"))
    lines = ["| task | read-out | right, % | n | AUC | majority, % |", "|---|---|--:|--:|--:|--:|"]
    print("\n".join(lines), flush=True)
    file = Path(args.results) / f"readouts-{Path(args.model).name}.md"
    for task in args.task:
        new = _open(task, args, store) if task in OPEN else _options(task, args, store)
        lines += new
        print("\n".join(new), flush=True)
        write_text(file, "\n".join(lines) + "\n")  # as it grows: a later task may lack its data
    print(f"table: {file}   records: {store.records}")


def _options(task: str, args: argparse.Namespace, store: Store) -> list[str]:
    """Return a line per reading of the answers of a task with options."""
    cell = cell_of(**_fields(args), task=task, method="vanilla")
    record = run_cell(cell, BENCHES.open(cell.model, cell.task, store))
    by_words = WORDS.keys() <= record["columns"].keys()
    extras = record["extras"] if by_words else {}
    return [
        _line(task, name, record["measures"][column], extras if column == LIKELIER else {})
        for column, name in (WORDS if by_words else CHOICES).items()
    ]


def _open(task: str, args: argparse.Namespace, store: Store) -> list[str]:
    """Return a line of how often the model finds the wanted answer of a pair likelier than the other, per token."""
    cell = cell_of(**_fields(args), task=task, method="vanilla")
    bench = BENCHES.open(cell.model, cell.task, store)
    odds = log_odds_per_token(bench.model, bench.tokenizer, bench.task.pairs[: args.limit])
    measure = summary({"wanted": [value > 0 for value in odds]})["wanted"]
    return [_line(task, "wanted answer of a ranking pair, per token", measure, {})]


def _line(task: str, name: str, measure: dict[str, float], extras: dict) -> str:
    area, majority = extras.get("AUC"), extras.get("majority, %")
    more = ["" if area is None else f"{area:.3f}", "" if majority is None else f"{majority:.1f}"]
    return "| " + " | ".join([task, name, with_interval(measure, 100), str(measure["n"]), *more]) + " |"


def _fields(args: argparse.Namespace) -> dict:
    names = ("model", "weights", "device", "dtype", "quick_proof", "data_dir", "limit", "chat", "batch_size")
    return {name: getattr(args, name) for name in names} | {"toxicity": "embedded"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser("main.py readouts", __doc__, parents=[arguments.model_options()])
    add = parser.add_argument
    known = [name for name, task in PAPER_TASKS.items() if issubclass(task, OptionTask | WholeChoices) or name in OPEN]
    add(
        "--task",
        nargs="+",
        choices=known,
        help=f"tasks to read (default: {' '.join(TASKS)}; with --chat only those answered in words)",
    )
    add("--data-dir", help="folder of the tasks' datasets (default: datasets/, then the hub)")
    add("--limit", type=int, help="use at most this many items of each task")
    add("--chat", action="store_true", help="put prompts into the model's chat format")
    add("--batch-size", type=int, help="prompts per batch (default: as many as fit)")
    add("--results", default="results", help="folder for records and the table (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise AUSteerError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    whole = [task for task in args.task or () if issubclass(PAPER_TASKS[task], WholeChoices)]
    if args.chat and whole:
        raise AUSteerError(f"tasks by whole choices have no chat form: leave out {', '.join(whole)}, or --chat")
    args.task = args.task or [t for t in TASKS if not (args.chat and issubclass(PAPER_TASKS[t], WholeChoices))]
    return args
