"""Prune a model and give its lost components back (RestoreLCC): dense, pruned and restored, side by side.

python main.py restore                                             the embedded models, Wanda at 50 %
python main.py restore --data_name svamp --sparsity 2:4            one task, semi-structured
python main.py restore --model M --data_name boolq --pruning magnitude
python main.py restore --model M --pairs mine.jsonl                your model, your pairs

The prompts of the training pairs calibrate the pruning. Grid points are chosen on validation, in the same way for
RestoreLCC and its controls, and tested once. Both models are in memory at once.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from austeer.code_identity import code_hash
from austeer.errors import AUSteerError, run_command
from austeer.evidence import Evidence
from austeer.forward import input_device
from austeer.identity import fingerprint, model_header, public_name
from austeer.methods.base import GridPoint
from austeer.methods.pruning import PRUNINGS, parse_sparsity, prune, same_length_batches
from austeer.methods.restore_lcc import COMPONENTS, MeanLost, Prepared, RandomHeads, RestoreLCC
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.live import LiveAnswerer
from eval.statistics import mcnemar, summary
from eval.tasks.base import Task
from experiments import records
from experiments.arguments import check, parents, task_names
from experiments.bench import BENCHES, Bench
from experiments.cell import EMBEDDED, FIELD_NAMES, bench_of
from experiments.search import full_grid, key_of
from experiments.store import Store

HELD_OUT_TEXTS = 500  # prompts of test items whose perplexity is measured
TOKENS_AT_ONCE = 1024  # tokens whose logits are in memory together


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    _check(args)
    folder, text = Path(args.results), []
    store = Store(records=str(folder / "restore"))
    flat = {name: value for name, value in vars(args).items() if name in FIELD_NAMES}
    for name in task_names(args):
        model, task = bench_of(**flat, task=name)
        bench = BENCHES.open(model, task, store)
        record = restore(bench, args.pruning, args.sparsity, args.components, args.draws)
        text += [f"## {task.label}", "", table(record), ""]
        print("\n".join(text[-4:]), flush=True)
    name = "-".join(
        [Path(args.model).name, Path(args.pairs).stem if args.pairs else args.data_name, "restore", args.pruning,
         args.sparsity.replace(":", "of")]
    )  # fmt: skip
    (folder / f"{name}.md").write_text("\n".join(text))
    print(f"table: {folder / name}.md   records: {folder / 'restore'}")


def restore(bench: Bench, pruning: str, sparsity: str, components: str, draws: int) -> dict:
    """Return the stored record of one task, or compute and store it."""
    target = parse_sparsity(sparsity)
    dense, tokenizer, task = bench.model, bench.tokenizer, bench.task
    if not task.validation:
        raise AUSteerError(
            f"{bench.task_spec.label} has no validation items to choose a grid point on: take another task, or give more pairs"
        )
    key = {
        "model": EMBEDDED if bench.model_spec.embedded else public_name(bench.model_spec.name),
        "task": bench.task_spec.label,
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
        "code": code_hash(_rows, prune, type(task), type(dense)),
    }
    record = bench.store.find(key)
    if record is not None:
        return record
    start = time.perf_counter()
    pruned = copy.deepcopy(dense)
    prompts = [tokenizer(pair.prompt, verbose=False)["input_ids"] for pair in task.pairs]
    longest = dense.config.max_position_embeddings
    counts = prune(pruned, pruning, target, [ids[-longest:] for ids in prompts])
    seconds = time.perf_counter() - start
    rows = _rows(bench, pruned, components, draws)
    achieved = {"zeros": counts.zeros, "weights": counts.weights, "by_module": counts.by_module}
    return bench.store.write(key, {"achieved": achieved, "pruning_s": seconds, "rows": rows})


def _rows(bench: Bench, pruned: PreTrainedModel, components: str, draws: int) -> list[dict]:
    dense, tokenizer, task = bench.model, bench.tokenizer, bench.task
    texts = [tokenizer(text, verbose=False)["input_ids"] for text in dict.fromkeys(item.prompt for item in task.test)]
    texts = [ids[: dense.config.max_position_embeddings] for ids in texts[:HELD_OUT_TEXTS]]

    def test_row(label: str, model: PreTrainedModel, plan: Plan | None = None, **details) -> dict:
        with steer(model, plan) if plan is not None else nullcontext():
            scores = task.columns(task.test, task.answers(LiveAnswerer(model, tokenizer), task.test))
            held_out = perplexity(model, texts)
        n_shifted = 0 if plan is None else len(plan)
        measures = summary(scores.columns)
        return {"label": label, "measure": scores.main, **measures[scores.main], "perplexity": held_out, "touched": n_shifted,
                **details, "columns": records.pack_columns(scores.columns)}  # fmt: skip

    rows = [test_row("dense", dense), test_row("pruned", pruned)]
    floor = _validate(task, pruned, tokenizer)

    def no_ranks(momentum: str):
        raise AssertionError("RestoreLCC looks at no ranks")

    start = time.perf_counter()
    method = RestoreLCC(dense, components)
    prepared = method.prepare(Evidence(pruned, tokenizer, task.pairs, "attention", no_ranks))
    cost = {"prepare_s": time.perf_counter() - start}
    candidates = [
        (method, 0),
        *((RandomHeads(dense, components), draw) for draw in range(draws)),
        (MeanLost(dense, components), 0),
    ]
    for candidate, draw in candidates:
        label = candidate.label + (f", draw {draw + 1}" if candidate.draws else "")
        chosen, scores, plan = _search(candidate, prepared, draw, bench.grid_kind, task, tokenizer, floor)
        details = {"settings": chosen, "grid_scores": scores, **cost}
        # where no grid point beats the pruned model on validation, it stays as it is
        rows.append(test_row(label, pruned, plan, **details) if plan else {**rows[1], "label": label, **details})
        if candidate is method and plan:
            # the gain of training alone, on a model that has lost nothing: restoration is what exceeds it
            on_dense = replace(prepared, model=dense, header=model_header(dense))
            rows.append(test_row("dense, trained alike", dense, method.plan(on_dense, chosen), settings=chosen))
    return rows


def _search(method: RestoreLCC, prepared: Prepared, draw: int, kind: str, task: Task, tokenizer, floor: list[float]):
    plans: dict[str, Plan] = {}

    def ask(points: Sequence[GridPoint], start: int, stop: int) -> list[list[float]]:
        plans.update({key_of(point): method.plan(prepared, point, draw) for point in points})
        return [_validate(task, prepared.model, tokenizer, plans[key_of(point)])[start:stop] for point in points]

    search = full_grid(ask, floor, method.grid(kind))
    return search.chosen, search.scores, search.chosen and plans[key_of(search.chosen)]


def _validate(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan | None = None
) -> list[float]:
    with steer(model, plan) if plan is not None else nullcontext():
        answers = task.answers(LiveAnswerer(model, tokenizer), task.validation)
    return task.columns(task.validation, answers).outcomes


@torch.inference_mode()
def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of all tokens but the first of each text."""
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
    """Return a Markdown table, a line per model, each compared with the pruned one."""
    rows, achieved = record["rows"], record["achieved"]
    columns = [next(iter(records.unpack_columns(row["columns"]).values())) for row in rows]
    paired = all(isinstance(value, bool) for value in columns[1])
    percent = 100 if paired else 1
    lines = [
        f"{record['pruning']}, {record['sparsity']}: {achieved['zeros']:,} of {achieved['weights']:,} weights are zero "
        f"({100 * achieved['zeros'] / achieved['weights']:.2f} %)",
        f"{rows[0]['measure']} on {rows[0]['n']} items of {record['test_split']} [95 % interval]; up / down and p: exact "
        "McNemar test against pruned; perplexity of held-out prompts",
        "",
        "| model | grid point | AUs shifted | right | perplexity | up / down | p |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row, values in zip(rows, columns, strict=True):
        value, low, high = (percent * row[key] for key in ("value", "low", "high"))
        point = ", ".join(f"{key}={value:g}" for key, value in (row.get("settings") or {}).items())
        cells = [row["label"], point, str(row["touched"] or ""), f"{value:.1f} [{low:.1f}, {high:.1f}]"]
        cells.append(f"{row['perplexity']:.3f}")
        gained, lost, p = mcnemar(columns[1], values) if paired else (0, 0, 1.0)
        cells += [f"{gained} / {lost}", f"{p:.1g}"] if paired and values is not columns[1] else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _check(args: argparse.Namespace) -> None:
    parse_sparsity(args.sparsity)  # before a model is loaded
    if args.draws < 0:
        raise AUSteerError(f"--draws is {args.draws}; it must be at least 0")
    check(args)


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
    add("--components", default="paper", choices=COMPONENTS, help="how many lost components the probes see: "
        + ", ".join(f"{name} {k}" for name, k in COMPONENTS.items()))  # fmt: skip
    add("--draws", type=int, default=3, help="number of draws of the control with random heads (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
