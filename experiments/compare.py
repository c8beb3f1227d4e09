"""Run AUSteer end to end: rank, choose k and alpha on validation, steer, test, and compare with the controls.

python main.py                                             the embedded models, every method, a picture
python main.py --data_name svamp --applied_module ffn      one task, one site
python main.py --model M --data_name copa                  a task of the paper on a real model
python main.py --model M --pairs mine.jsonl                your model, your pairs
python main.py --model M --pairs mine.jsonl --method fisher causal random-at-kl --at-kl 0.01 0.03
                                                           every method at the same KL, no strength searched
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError
from austeer.files import write_text
from austeer.methods.base import TOGETHER, Method, sites_of
from austeer.methods.registry import DEFAULT, METHODS, OWN_COMMAND, options_of, with_options
from austeer.ranks import AURanks
from austeer.tokens import PROTOCOLS
from experiments import kl_report, parts_report, plots, report
from experiments.arguments import check, parents, task_names
from experiments.bench import has_instruction
from experiments.cell import EMBEDDED, FIELD_NAMES, LIVE, Cell, TaskSpec, at_kl, bench_of, cell_of
from experiments.engines.answering import ENGINES, check_engine
from experiments.executors.base import run_cells
from experiments.executors.choose import executor_for
from experiments.report import LABELS
from experiments.search import SEARCHES
from experiments.store import Store

COSTS = Path(__file__).parents[1] / "benchmarks" / "results" / "methods-cpu.json"
FLIPS = 2  # draws of sign flips for every five of random AUs


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="To rank only, use MFU_screening.py; to save a plan, set_MFU.py. Finished cells are never computed again: "
        "to resume, repeat the command.", parents=[*parents(), arguments.attn_option()],
    )  # fmt: skip
    add = parser.add_argument
    add("--applied_module", default="both", choices=["both", *rmodels.SITES, *(name for name in TOGETHER if "+" in name)],
        help="site to steer; both: attention, then ffn (default); attention+neuron: the two at once, by the methods that can")  # fmt: skip
    add("--method", nargs="+", default=list(DEFAULT), choices=[*METHODS, "all"],
        metavar="NAME", help=f"methods to compare, or all (default: {' '.join(DEFAULT)}); --list-methods describes them")  # fmt: skip
    add("--list-methods", action="store_true", help="print all methods: what they edit, where, and what they cost")
    add("--option", nargs="+", default=[], metavar="METHOD.NAME=VALUE", type=_option,
        help="set options of methods, such as caa.readout=answer or sta.sae=FILE; --list-methods names them")  # fmt: skip
    add("--k", type=int, nargs="+", default=[], help="number of AUs to steer; with several values, the search chooses")
    add(
        "--alpha",
        type=float,
        nargs="+",
        default=[],
        help="strength of steering; with several values, the search chooses",
    )
    add("--search", choices=SEARCHES,
        help="how a grid point is chosen: by the whole grid on validation (default for the embedded models), by racing, "
        "which tries coarse points and then those around the leaders on growing samples (default for all others), by the "
        "paper's sample of 100 items, or on the test split itself, as for the paper's main numbers")  # fmt: skip
    add("--at-kl", type=float, nargs="+", default=[], metavar="NATS",
        help="compare at equal KL instead of searching a strength: one scalar brings every method to each of these KLs on neutral text, "
        "in nats per token, such as 0.003 0.01 0.03 0.1")  # fmt: skip
    add("--neutral", metavar="FILE", help="neutral text on which KL is measured (default: WikiText-2 if --data-dir has it, else prose "
        "that comes with the project; for the embedded models documents of their own kind)")  # fmt: skip
    add("--steer", type=_yes_or_no, default=True, metavar="yes|no", help="no: run only vanilla and prompt-only")
    add("--path", default="AU_ranks", help="folder of ranks; those that fit are reused (default: %(default)s)")
    add(
        "--draws",
        type=int,
        default=5,
        help="number of draws of random controls and of few-shot examples (default: %(default)s)",
    )
    add(
        "--protocol",
        default="clean",
        choices=PROTOCOLS,
        help="clean (default), or paper: as the authors' code, quirk by quirk",
    )
    add("--n-pairs", type=int, help="use only the first N contrastive pairs, or N random ones with --pairs-draw")
    add("--pairs-draw", type=int, nargs="+", default=[], metavar="SEED", help="draw --n-pairs pairs at random, once for each "
        "of these seeds; what belongs together, such as COPA's mirrored items, is drawn together")  # fmt: skip
    add("--encoder", help="sentence encoder for similar wrong answers, or tfidf (default: all-MiniLM-L6-v2)")
    add("--swapped-choices", action="store_true", help="make a second pair of every item of copa, its choices swapped")
    add(
        "--per-token",
        action="store_true",
        help="compare likelihoods of whole choices per token (the tasks that end in -choices)",
    )
    add("--batch-size", type=int, help="prompts per batch (default: as many as fit; 1 with --protocol paper)")
    add("--quantization", choices=["4bit", "8bit"], help="load the weights through bitsandbytes")
    add("--engine", default=LIVE, choices=ENGINES, help="what answers: the loaded model (live, default), or vLLM, where "
        "each plan becomes an adapter and a whole grid runs as one batch (needs .venv-vllm/bin/python; docs/serving.md)")  # fmt: skip
    add("--jobs", type=int, help="processes for the embedded models (default: one per core, at most 4)")
    add("--ray", metavar="ADDRESS", help="compute cells on a Ray cluster: HOST:PORT, auto or local (docs/scaling.md)")
    args = parser.parse_args(argv)
    if args.at_kl and args.search:
        raise AUSteerError("--at-kl searches no strength: leave out --search")
    args.search = args.search or _default_search(args.model)
    return args


def _default_search(model: str) -> str:
    """Return the default search: the grid of real models has eight times as many points, so they race."""
    return "grid" if model == EMBEDDED else "racing"


def _method_table() -> str:
    yes_no = {True: "yes", False: "no"}
    measured = json.loads(COSTS.read_text())["methods"] if COSTS.exists() else {}
    lines = [
        "| --method | edits | AUs | preparation, s | memory, MB | time per token | sites | trains | foldable | options "
        "| from |",
        "|---|---|--:|--:|--:|--:|---|---|---|---|---|",
    ]
    for name, m in {**METHODS, **OWN_COMMAND}.items():
        cost = measured.get(name, {})
        costs = " | ".join(str(cost.get(key, "")) for key in ("touched", "prepare_s", "memory_mb", "time_per_token"))
        fold = "not at layer" if m.foldable and "layer" in m.sites else yes_no[m.foldable]
        options = ", ".join(options_of(name)) if name in METHODS else ""
        where = ", ".join(m.sites)
        lines.append(
            f"| {name} | {m.edits} | {costs} | {where} | {yes_no[m.trains]} | {fold} | {options} | {m.paper} |"
        )
    lines += [
        "",
        "AUs, seconds, memory and time per token (1: unsteered) were measured on an embedded model with 500 pairs "
        "(benchmarks/methods.py). Foldable: the plan can be written into the weights. Options: --option NAME.OPTION=VALUE.",
    ]
    return "\n".join(lines)


def _yes_or_no(text: str) -> bool:
    """Parse yes or no. The authors' --steer was bool(text), which is true of any text, "False" included."""
    answers = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if text.lower() not in answers:
        raise argparse.ArgumentTypeError(f"give yes or no, not {text!r}")
    return answers[text.lower()]


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise argparse.ArgumentTypeError(f"give METHOD.NAME=VALUE, not {text!r}")
    return key, value


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _arguments(argv)
    if args.list_methods:
        print(_method_table())
        return None
    _check(args)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    sites = sites_of("both") if args.applied_module == "both" else (args.applied_module,)
    store = Store(args.path, str(Path(args.results) / "records"))
    cells: dict[str, list[Cell]] = {}
    for task in _tasks(args):
        of_task = cells.setdefault(_heading(task, args), [])
        of_task += [cell for cell in _cells(task, sites, args) if cell not in of_task]  # draws of pairs share vanilla
    executor = executor_for(args.jobs, args.ray, args.device, args.engine, tiny=args.model == EMBEDDED)
    try:
        records = dict(run_cells(list(dict.fromkeys(chain(*cells.values()))), store, executor))
    finally:
        executor.close()
    failed = {cell: record["failed"] for cell, record in records.items() if "failed" in record}
    unranked = [record["failed"] for record in records.values() if record.get("stage") == "ranking"]
    if unranked:  # what cannot even be ranked, such as data that are missing, is a mistake in the command
        raise AUSteerError(unranked[0])
    for cell, why in failed.items():
        print(f"FAILED {cell}: {why}", file=sys.stderr)
    rows = {
        task: [records[cell] for cell in task_cells if cell not in failed]
        for task, task_cells in cells.items()
        if task_cells[0] not in failed  # without vanilla there is nothing to compare with
    }
    if rows:
        (_report_at_kl if args.at_kl else _report)(rows, store, sites, args)
    return 1 if failed else None


def _check(args: argparse.Namespace) -> None:
    if args.ray and args.device not in (None, "cpu"):
        raise AUSteerError("--ray assigns devices itself: drop --device (except cpu)")
    check_engine(
        args.engine,
        args.device,
        task=args.data_name,
        pairs=args.pairs,
        quantization=args.quantization,
        attn=args.attn,
        batch_size=args.batch_size,
        ray=args.ray,
    )
    check(args, "draws", "jobs", "batch_size", "n_pairs")
    if args.pairs_draw and not args.n_pairs:
        raise AUSteerError("--pairs-draw draws a number of pairs: add --n-pairs")
    if any(k < 1 for k in args.k):
        raise AUSteerError(f"--k must be whole numbers of at least 1, not {min(args.k)}")
    if not all(map(math.isfinite, args.alpha)):
        raise AUSteerError("--alpha must be finite numbers")
    if any(not 0 < kl < math.inf for kl in args.at_kl):
        raise AUSteerError("--at-kl must be positive numbers of nats per token, such as 0.01")
    if args.neutral and args.model == EMBEDDED:
        raise AUSteerError("--neutral needs --model: prose is unknown words to the embedded models")
    if args.pairs or args.model == EMBEDDED:
        ignored = [
            f"--{name.replace('_', '-')}"
            for name in ("chat", "data_dir", "encoder", "swapped_choices", "batch_size", "per_token")
            if getattr(args, name)
        ]
        ignored += ["--protocol paper"] if args.protocol == "paper" else []
        if ignored:
            raise AUSteerError(f"{', '.join(ignored)}: for the paper's tasks only, which need --model and --data_name")
    methods = [METHODS[name] for name in args.method if name != "all"]
    unsupported = [method.name for method in methods if args.protocol == "paper" and not in_protocol("paper", method)]
    if unsupported and args.method != list(DEFAULT):
        raise AUSteerError(f"{', '.join(unsupported)} is not in the authors' code: use --protocol clean")
    for key, value in args.option:
        name, _, option = key.partition(".")
        if name not in METHODS:
            raise AUSteerError(f"--option {key}: there is no method {name!r}; --list-methods lists them")
        if "all" not in args.method and name not in args.method:
            raise AUSteerError(f"--option {key}: {name} does not run; add it to --method")
        with_options(name, {option: value})


def _tasks(args: argparse.Namespace) -> list[TaskSpec]:
    """Return the requested tasks, each once per draw of its pairs."""
    draws = dict.fromkeys(args.pairs_draw) or [None]
    return [bench_of(**_flat(name, draw, args))[1] for name in task_names(args) for draw in draws]


def _heading(task: TaskSpec, args: argparse.Namespace) -> str:
    """Name the section of the report: at equal KL the draws of the pairs share one, as they are averaged there."""
    draw = task.pairs.pairs_draw
    return task.label if draw is None or args.at_kl else f"{task.label}, draw {draw} of the pairs"


def _flat(task: str, pairs_draw: int | None, args: argparse.Namespace) -> dict:
    """Return the fields that all cells of a task share."""
    flat = {name: value for name, value in vars(args).items() if name in FIELD_NAMES and name != "method"}
    more = {"task": task, "pairs_draw": pairs_draw, "ks": args.k, "alphas": args.alpha, "options": args.option}
    return flat | more


def in_protocol(protocol: str, method: Method) -> bool:
    """Say whether a protocol has the method: the authors' code steers by activation momentum alone."""
    return protocol == "clean" or method.momenta == ("activation",)


def _cells(task: TaskSpec, sites: Sequence[str], args: argparse.Namespace) -> list[Cell]:
    flat = _flat(task.name, task.pairs.pairs_draw, args)
    vanilla = cell_of(**flat, method="vanilla")
    cells = [vanilla.unsteered("prompt-only")] if has_instruction(vanilla.model, vanilla.task) else []
    names = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    for name in names if args.steer else ():
        method = METHODS[name]
        if not in_protocol(task.protocol, method):
            continue
        draws = (max(1, args.draws * FLIPS // 5) if name == "flipped" else args.draws) if method.draws else 1
        cells += [
            cell_of(**flat, method=name, site=site, draw=draw)
            for site in _places(method, sites)
            for draw in range(draws)
        ]
    if args.at_kl:
        cells = list(dict.fromkeys(at_kl(cell, level) for cell in cells for level in args.at_kl))
    return [vanilla, *cells]


def _places(method: Method, sites: Sequence[str]) -> Sequence[str]:
    """Return the sites that a method acts at: of these, or of their parts, or its own, such as the residual stream."""
    parts = [part for site in sites for part in sites_of(site)]
    return [s for s in sites if s in method.sites] or [s for s in parts if s in method.sites] or method.sites[:1]


def _report(rows: dict[str, list[dict]], store: Store, sites: Sequence[str], args: argparse.Namespace) -> None:
    text, parts = [], {}
    for task, task_rows in rows.items():
        text += [f"## {task}", "", report.table(task_rows, LABELS), ""]
        text += [f"- {line}" for line in report.verdict(task_rows, LABELS)] + [""]
        if parts_report.has_parts(task_rows):
            lines = parts[task] = parts_report.lines_of(task_rows, LABELS)
            text += [parts_report.table(lines), ""]
            text += [f"- {line}" for line in parts_report.verdict(lines, task_rows[0])] + [""]
        if likelihoods := parts_report.likelihood_table(task_rows, LABELS):
            text += [likelihoods, ""]
        measures = report.other_measures(task_rows, LABELS)
        text += [measures, ""] if measures else []
        text += [_conditions(task_rows, args), ""]
    folder, name = Path(args.results), _file_name(args)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(text))
    print("\n" + "\n".join(text))
    method = next((name for name in ("causal", "published") if args.steer and {name, "all"} & {*args.method}), None)
    if method and all(any(row["method"] == method for row in task_rows) for task_rows in rows.values()):
        model, momentum = cell_of(**_flat("", None, args), method=method).model, METHODS[method].momentum
        scores = {
            _heading(task, args): {
                site: AURanks.load(store.ranks_file(model, task, momentum, site)).score.numpy()
                for site in _places(METHODS[method], sites)
            }
            for task in _tasks(args)
        }
        plots.comparison(rows, scores, LABELS, method, folder / f"{name}.png")
        print(f"picture: {folder / name}.png")
    if parts and args.steer:
        plots.gains(parts, folder / f"{name}-parts.png")
        print(f"parts of the gains: {folder / name}-parts.png")
    print(f"table: {folder / name}.md   records: {folder / 'records'}")
    # in a file of their own, since times differ between runs and tables of results must not
    costs = "\n\n".join(f"## {task}\n\n{report.costs(task_rows, LABELS)}" for task, task_rows in rows.items())
    (folder / f"{name}-costs.md").write_text(costs + "\n")
    print(f"costs: {folder / name}-costs.md")
    if args.model != EMBEDDED and not args.pairs:
        _print_answer_files(store, args.data_name, next(iter(rows.values())))


def _report_at_kl(rows: dict[str, list[dict]], store: Store, sites: Sequence[str], args: argparse.Namespace) -> None:
    text, curves = [], {}
    for task, task_rows in rows.items():
        text += [f"## {task}", "", kl_report.heading(task_rows, LABELS), ""]
        for name, same_rows in zip((task, f"{task}: skill"), parts_report.measures(task_rows), strict=False):
            text += [f"{kl_report.measure(same_rows)}:", "", kl_report.table(same_rows, LABELS), ""]
            if points := kl_report.curves(same_rows, LABELS):
                curves[name] = points
        if likelihoods := parts_report.likelihood_table(task_rows, LABELS):
            text += [likelihoods, ""]
        text += [_conditions(task_rows, args), ""]
    file = Path(args.results) / f"{_file_name(args)}-at-kl.md"
    write_text(file, "\n".join(text))
    print("\n" + "\n".join(text))
    if curves:
        plots.gains(curves, file.with_suffix(".png"))
        print(f"picture: {file.with_suffix('.png')}")
    print(f"table: {file}   records: {store.records}")


def _conditions(rows: Sequence[dict], args: argparse.Namespace) -> str:
    """Say under which conditions the rows of a task were computed."""
    conditions = {"prompts": rows[0]["wording"], "pairs": rows[-1]["pairs_by"], "protocol": rows[0]["protocol"]}
    conditions["answers"] = rows[0]["engine"] if args.engine != LIVE else None
    conditions["attention kernel"] = args.attn
    conditions["weights"] = ", ".join(filter(None, (rows[0].get(key) for key in ("weights", "converted_from"))))
    return "; ".join(f"{name}: {value}" for name, value in conditions.items() if value)


def _file_name(args: argparse.Namespace) -> str:
    """Return the name of the tables and pictures of a command, without their endings."""
    name = f"{Path(args.model).name}-{Path(args.pairs).stem if args.pairs else args.data_name}"
    name += "-paper-protocol" if args.protocol == "paper" else ""
    name += "-test2" if args.test_split == "test2" else ""
    name += f"-{args.search}" if args.search != _default_search(args.model) else ""
    name += f"-{args.engine}" if args.engine != LIVE else ""
    name += "-swapped-choices" if args.swapped_choices else ""
    name += "-per-token" if args.per_token else ""
    name += f"-{args.n_pairs}-pairs" if args.n_pairs else ""
    name += "".join(f"-draw-{draw}" for draw in args.pairs_draw)
    name += f"-{args.attn}" if args.attn else ""
    name += f"-{Path(args.weights).name}" if args.weights else ""
    return name


def _print_answer_files(store: Store, task: str, rows: list[dict]) -> None:
    """Print the file of answers behind every row, for judges and human raters."""
    files = {}
    for record in rows:
        file = store.answers_file(record["id"])
        if file.exists() and record["draw"] == 0:
            files[" ".join(filter(None, (record["method"], record["site"])))] = file
    print("answers:\n" + "\n".join(f"  {name:<20} {file}" for name, file in files.items()))
    if task == "bpo":
        print(
            f"for the win rate of one of them: python main.py judge --ours FILE --theirs {files['vanilla']} --judge MODEL"
        )
