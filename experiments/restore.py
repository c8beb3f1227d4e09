"""Prune a model and give its lost components back (RestoreLCC): dense, pruned and restored, side by side.

python main.py restore                                             the embedded models, Wanda at 50 %
python main.py restore --data_name svamp --sparsity 2:4            one task, semi-structured
python main.py restore --model M --data_name boolq --pruning magnitude
python main.py restore --model M --pairs mine.jsonl                your model, your pairs

The prompts of the training pairs calibrate the pruning. Settings are chosen on validation, alike for RestoreLCC and its
controls, and tested once. Both models are in memory at once.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import rmodels
from austeer.errors import AUSteerError, run_command
from austeer.evidence import Evidence
from austeer.forward import input_device
from austeer.identity import fingerprint, model_header, public_name
from austeer.methods.base import GridPoint
from austeer.methods.pruning import PRUNINGS, ZeroCounts, parse_sparsity, prune, same_length_batches
from austeer.methods.restore_lcc import COMPONENTS, MeanLost, Prepared, RandomHeads, RestoreLCC
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from austeer.steering import steer
from embedded.tasks import TASKS
from eval.statistics import mcnemar, summary
from eval.tasks.base import Task
from eval.tasks.registry import PAPER_TASKS
from experiments import records
from experiments.search import full_grid, key_of
from experiments.setting import EMBEDDED, Setting, load

HELD_OUT_TEXTS = 500  # prompts of test items, for perplexity
TOKENS_AT_ONCE = 1024  # whose logits are in memory together


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    settings, folder = _settings(args), Path(args.results)
    text = []
    for setting in settings:
        record = restore(setting, args.pruning, args.sparsity, args.components, args.draws, folder / "restore")
        text += [f"## {setting.task_name}", "", table(record), ""]
        print("\n".join(text[-4:]), flush=True)
    name = "-".join(
        [Path(args.model).name, Path(args.pairs).stem if args.pairs else args.data_name, "restore", args.pruning,
         args.sparsity.replace(":", "of")]
    )  # fmt: skip
    (folder / f"{name}.md").write_text("\n".join(text))
    print(f"table: {folder / name}.md   records: {folder / 'restore'}")


def restore(setting: Setting, pruning: str, sparsity: str, components: str, draws: int, folder: Path) -> dict:
    """The record of one task: found, or made and written."""
    wanted = parse_sparsity(sparsity)
    dense, tokenizer, task = load(setting)
    if not task.validation:
        raise AUSteerError(f"{setting.task_name} has no validation items to choose settings on")
    question = {
        "model": EMBEDDED if setting.model == EMBEDDED else public_name(setting.model),
        "task": setting.task_name,
        "method": "restore",
        "fingerprint": fingerprint(dense),
        "dtype": str(dense.dtype),
        "device": dense.device.type,
        "pairs_hash": pairs_hash(task.pairs),
        "pairs_by": task.pairs_by,
        "items_hash": task.fingerprint,
        "test_split": task.test_split,
        "wording": task.wording,
        "measured": task.measured,
        "pruning": pruning,
        "sparsity": sparsity,
        "components": components,
        "draws": draws,
        "command": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),  # its code decides too
    }
    found = records.find(folder, question)
    if found is not None:
        return found
    start = time.perf_counter()
    pruned = copy.deepcopy(dense)
    prompts = [tokenizer(pair.prompt, verbose=False)["input_ids"] for pair in task.pairs]
    longest = dense.config.max_position_embeddings
    achieved = prune(pruned, pruning, wanted, [ids[-longest:] for ids in prompts])
    seconds = time.perf_counter() - start
    rows = _rows(setting, pruned, components, draws)
    result = {"achieved": _told(achieved), "pruning_s": seconds, "rows": rows}
    return records.write(folder, question, result)


def _rows(setting: Setting, pruned: PreTrainedModel, components: str, draws: int) -> list[dict]:
    dense, tokenizer, task = load(setting)
    texts = [tokenizer(text, verbose=False)["input_ids"] for text in dict.fromkeys(item.prompt for item in task.test)]
    texts = [ids[: dense.config.max_position_embeddings] for ids in texts[:HELD_OUT_TEXTS]]

    def tested(label: str, model: PreTrainedModel, plan: Plan | None = None, **more) -> dict:
        with steer(model, plan) if plan is not None else nullcontext():
            columns = task.columns(task.test, task.answers(model, tokenizer, task.test))
            surprise = perplexity(model, texts)
        touched = 0 if plan is None else len(plan)
        measures = summary(columns)
        measure = next(iter(columns))
        return {"label": label, "measure": measure, **measures[measure], "perplexity": surprise, "touched": touched, **more,
                "columns": records.pack_columns(columns)}  # fmt: skip

    rows = [tested("dense", dense), tested("pruned", pruned)]
    floor = _validated(task, pruned, tokenizer)
    kind = "small" if setting.model == EMBEDDED else "full"

    def no_ranks(momentum: str):
        raise AssertionError("RestoreLCC looks at no ranks")

    start = time.perf_counter()
    method = RestoreLCC(dense, components)
    prepared = method.prepare(Evidence(pruned, tokenizer, task.pairs, "attention", no_ranks))
    cost = {"prepare_s": time.perf_counter() - start}
    tries = [
        (method, 0),
        *((RandomHeads(dense, components), draw) for draw in range(draws)),
        (MeanLost(dense, components), 0),
    ]
    for tried, draw in tries:
        label = tried.label + (f", draw {draw + 1}" if tried.draws else "")
        chosen, scores, plan = _searched(tried, prepared, draw, kind, task, tokenizer, floor)
        more = {"settings": chosen, "grid_scores": scores, **cost}
        # where nothing beats the pruned model on validation, nothing is done
        rows.append(tested(label, pruned, plan, **more) if plan else {**rows[1], "label": label, **more})
        if tried is method and plan:
            # what training alone gives, where nothing was lost: restoring is what goes beyond it
            alike = replace(prepared, model=dense, header=model_header(dense))
            rows.append(tested("dense, trained alike", dense, method.plan(alike, chosen), settings=chosen))
    return rows


def _searched(method: RestoreLCC, prepared: Prepared, draw: int, kind: str, task: Task, tokenizer, floor: list[float]):
    plans: dict[str, Plan] = {}

    def ask(some: Sequence[GridPoint], start: int, stop: int) -> list[list[float]]:
        plans.update({key_of(settings): method.plan(prepared, settings, draw) for settings in some})
        return [_validated(task, prepared.model, tokenizer, plans[key_of(settings)])[start:stop] for settings in some]

    found = full_grid(ask, floor, method.grid(kind))
    return found.chosen, found.scores, found.chosen and plans[key_of(found.chosen)]


def _validated(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan | None = None
) -> list[float]:
    with steer(model, plan) if plan is not None else nullcontext():
        columns = task.columns(task.validation, task.answers(model, tokenizer, task.validation))
    return next(iter(columns.values()))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Of all tokens but the first of each text."""
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise AUSteerError("perplexity needs a prompt of at least two tokens")
    loss, count = 0.0, 0
    for batch in same_length_batches(texts, TOKENS_AT_ONCE):
        ids = torch.tensor([texts[index] for index in batch], device=input_device(model))
        logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss -= float(logp.gather(2, ids[:, 1:, None].to(logp.device)).double().sum())
        count += ids[:, 1:].numel()
    return math.exp(loss / count)


def table(record: dict) -> str:
    """Markdown: a line a model, each against the pruned one."""
    rows, achieved = record["rows"], record["achieved"]
    columns = [next(iter(records.unpack_columns(row["columns"]).values())) for row in rows]
    paired = all(isinstance(value, bool) for value in columns[1])
    percent = 100 if paired else 1
    lines = [
        f"{record['pruning']}, {record['sparsity']}: {achieved['zeros']:,} of {achieved['weights']:,} weights are zero "
        f"({100 * achieved['zeros'] / achieved['weights']:.2f} %)",
        f"{rows[0]['measure']} on {rows[0]['n']} items of {record['test_split']} [95 % interval]; up / down and p: exact "
        "McNemar against pruned; perplexity of held-out prompts",
        "",
        "| model | settings | AUs shifted | right | perplexity | up / down | p |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row, values in zip(rows, columns, strict=True):
        value, low, high = (percent * row[key] for key in ("value", "low", "high"))
        settings = ", ".join(f"{key}={value:g}" for key, value in (row.get("settings") or {}).items())
        cells = [row["label"], settings, str(row["touched"] or ""), f"{value:.1f} [{low:.1f}, {high:.1f}]"]
        cells.append(f"{row['perplexity']:.3f}")
        gained, lost, p = mcnemar(columns[1], values) if paired else (0, 0, 1.0)
        cells += [f"{gained} / {lost}", f"{p:.1g}"] if paired and values is not columns[1] else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _told(achieved: ZeroCounts) -> dict:
    return {"zeros": achieved.zeros, "weights": achieved.weights, "by_module": achieved.by_module}


def _settings(args: argparse.Namespace) -> list[Setting]:
    parse_sparsity(args.sparsity)  # before a model is loaded
    for name in ("draws", "limit"):
        value = getattr(args, name)
        if value is not None and value < (name == "limit"):
            raise AUSteerError(f"--{name} is {value}; it must be at least {int(name == 'limit')}")
    if args.model == EMBEDDED and args.pairs:
        raise AUSteerError("--pairs needs --model: the embedded models have tasks of their own")
    if args.model == EMBEDDED and args.data_name not in ("all", *TASKS):
        raise AUSteerError(f"the embedded models do {', '.join(TASKS)}; {args.data_name} needs --model")
    if args.model != EMBEDDED and not args.pairs and args.data_name not in PAPER_TASKS:
        raise AUSteerError(f"--model needs --data_name, one of {', '.join(PAPER_TASKS)}, or --pairs")
    rmodels.check_device(args.device)
    tasks = (
        [name for name in TASKS if args.data_name in ("all", name)]
        if args.model == EMBEDDED
        else [args.pairs or args.data_name]
    )
    shared = {
        name: getattr(args, name) for name in ("device", "dtype", "test_split", "limit", "data_dir", "chat", "toxicity")
    }
    return [Setting(args.model, task, tuple(args.fields), **shared) for task in tasks]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py restore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=EMBEDDED, help="embedded (default), a hub id, or the folder of a checkpoint")
    add("--data_name", default="all", help="a task, as in main.py; all: those of the embedded models (default)")
    add("--pairs", help="your own contrastive pairs (.jsonl or .csv), for --model other than embedded")
    add("--fields", nargs=3, default=["prompt", "positive", "negative"], metavar=("PROMPT", "RIGHT", "WRONG"),
        help="names of the three fields in the file of pairs")  # fmt: skip
    add("--pruning", default="wanda", choices=PRUNINGS, help="how to prune (default: %(default)s)")
    add("--sparsity", default="0.5", help="share of zeros, or zeros:group such as 2:4 (default: %(default)s)")
    add("--components", default="paper", choices=COMPONENTS, help="lost components the probes see: "
        + ", ".join(f"{name} {k}" for name, k in COMPONENTS.items()))  # fmt: skip
    add("--draws", type=int, default=3, help="draws of the control with random heads (default: %(default)s)")
    add("--results", default="results", help="folder for records and table (default: %(default)s)")
    add("--test_split", default="test", choices=["test", "test2"], help="the embedded tasks' test split")
    add("--limit", type=int, help="at most this many validation and test items: a quick look")
    add("--data-dir", help="folder of the paper's datasets (default: datasets/, then the hub)")
    add("--toxicity", default="local", metavar="SCORER", help="who scores toxicity, as in main.py")
    add("--chat", action="store_true", help="ask in the model's chat format")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
