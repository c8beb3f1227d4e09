"""Prune a model and give its lost components back (RestoreLCC): dense, pruned, restored and rivals, side by side.

python main.py restore                                             the embedded models, Wanda at 50 %
python main.py restore --data_name svamp --sparsity 2:4            one task, semi-structured
python main.py restore --model M --data_name boolq --pruning sparsegpt --out restored
python main.py restore --model M --data_name boolq --preset original --lm-eval      the published setting
python main.py restore --model M --pairs mine.jsonl                your model, your pairs

By default the prompts of the training pairs calibrate the pruning. Grid points are chosen on validation, in the same way
for RestoreLCC, its controls and its rivals, and tested once. Both models are in memory at once. Rows are kept as they
come: the same command continues a stopped run. docs/restore.md describes rows, preset and what is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from austeer.errors import AUSteerError, run_command
from austeer.export.restored import check_savable, save_restored
from austeer.files import check_new
from austeer.methods.base import ORIGINAL
from austeer.methods.restore_lcc import COMPONENTS, RECIPES
from austeer.pruning.prune import PRUNINGS, parse_sparsity
from austeer.pruning.structured import check_share
from experiments.arguments import check, parents, task_names
from experiments.bench import BENCHES
from experiments.cell import EMBEDDED, FIELD_NAMES, bench_of
from experiments.restoration.contenders import RIVALS, check_peft
from experiments.restoration.lab import Lab
from experiments.restoration.material import find_files, gather
from experiments.restoration.measures import LM_EVAL_TASKS, check_lm_eval
from experiments.restoration.rows import Restoration
from experiments.restoration.table import table
from experiments.store import Store

FILES = ("instructions", "calibration", "text")


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    _check(args)
    files = find_files({kind: getattr(args, kind) for kind in FILES}, args.preset, args.data_dir)
    recipe = RECIPES[args.preset]
    recipe = replace(recipe, components=args.components or recipe.components)
    folder, text = Path(args.results), []
    store = Store(records=str(folder / "restore"))
    flat = {name: value for name, value in vars(args).items() if name in FIELD_NAMES}
    for name in task_names(args):
        model, task = bench_of(**flat, task=name)
        bench = BENCHES.open(model, task, store)
        if args.out:
            check_savable(bench.model)
        lab = Lab(bench, gather(bench, files), args.pruning, args.sparsity, recipe)
        restoration = Restoration(lab, args.draws, tuple(args.rivals), tuple(args.lm_eval or ()))
        rows = restoration.rows()
        text += [f"## {task.label}", "", table(rows, lab), ""]
        print("\n".join(text[-4:]), flush=True)
    name = "-".join(
        [Path(args.model).name, Path(args.pairs).stem if args.pairs else args.data_name, "restore", args.pruning,
         args.sparsity.replace(":", "of"), *(["original"] if args.preset == ORIGINAL else []), *([Path(args.weights).name] if args.weights else [])]
    )  # fmt: skip
    (folder / f"{name}.md").write_text("\n".join(text))
    print(f"table: {folder / name}.md   records: {folder / 'restore'}")
    if args.out:
        plan = restoration.plan(rows)
        if plan is None:
            raise AUSteerError("no grid point beat the pruned model on validation: there is nothing to save")
        save_restored(lab.pruned, bench.tokenizer, plan, args.out)
        print(f"restored model: {args.out}, an ordinary checkpoint with the plan in the bias of o_proj")


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded."""
    sparsity = parse_sparsity(args.sparsity)
    if args.pruning == "structured":
        check_share(sparsity)
    if args.draws < 0:
        raise AUSteerError(f"--draws is {args.draws}; it must be at least 0")
    check(args)
    for file in filter(None, (getattr(args, kind) for kind in FILES)):
        if not Path(file).is_file():
            raise AUSteerError(f"no such file: {file}")
    if args.out:
        if len(task_names(args)) > 1:
            raise AUSteerError("--out saves one model: name a task with --data_name")
        check_new(args.out)
    if {"lora", "dora"} & set(args.rivals):
        check_peft()
    if args.lm_eval:
        check_lm_eval()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py restore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents(),
    )
    add = parser.add_argument
    add("--pruning", default="wanda", choices=PRUNINGS, help="how to prune (default: %(default)s)")
    add(
        "--sparsity",
        default="0.5",
        help="share of weights set to zero, or zeros:group such as 2:4 (default: %(default)s)",
    )
    add("--preset", default="ours", choices=RECIPES, help="original: the published schedule, and instructions, general "
        "text and WikiText-2 in place of the task's own data (default: %(default)s)")  # fmt: skip
    add("--calibration", metavar="FILE", help="general text that calibrates pruning, in place of the pairs' prompts")
    add(
        "--instructions", metavar="FILE", help="instructions in Alpaca's form to train on, in place of the task's pairs"
    )
    add("--text", metavar="FILE", help="text whose perplexity is measured, in place of the test prompts")
    add("--components", choices=COMPONENTS, help="how many lost components the probes see: "
        + ", ".join(f"{name} {k}" for name, k in COMPONENTS.items()) + " (default: paper; of preset original: code)")  # fmt: skip
    add("--draws", type=int, default=3, help="number of draws of the control with random heads (default: %(default)s)")
    add("--rivals", nargs="*", choices=RIVALS, default=["lora", "eora"], help="rows beside RestoreLCC and its controls "
        "(default: lora eora; none: --rivals alone)")  # fmt: skip
    add("--lm-eval", nargs="*", metavar="TASK", help="also measure zero-shot accuracies on these tasks of lm-eval "
        f"(without a name: {', '.join(LM_EVAL_TASKS)})")  # fmt: skip
    add("--out", metavar="DIR", help="save the restored model to this new folder")
    args = parser.parse_args(argv)
    if args.lm_eval == []:
        args.lm_eval = list(LM_EVAL_TASKS)
    return args


if __name__ == "__main__":
    run_command(main)
