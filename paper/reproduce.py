"""Reproduce the paper: compute every missing number of a scale's tables and figures, and write the report.

bash reproduce.sh                                  the embedded models: everything, in minutes, on two cores
bash reproduce.sh --scale paper --estimate         what the paper's models would take; computes nothing
bash reproduce.sh --scale paper --only table1 --models llama2-7b-chat
bash reproduce.sh --scale paper --dry-run          the real code paths, on tiny random checkpoints

To resume, repeat the command: what is done is not computed again. The report is rewritten after every finished block.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError, run_command
from experiments.cell import LIVE, Cell
from experiments.engines.answering import ENGINES, check_engine
from experiments.executors.base import Executor, run_cells
from experiments.executors.choose import executor_for
from experiments.store import Store
from paper import estimate, panels, specs
from paper.dry_run import tiny_checkpoints
from paper.manifest import Manifest, bundle
from paper.progress import Progress
from paper.render import page
from paper.specs import Panel, Spec

DRY_LIMIT = 2  # items per split of a dry run


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _arguments(argv)
    _check(args)
    transformers_logging.disable_progress_bar()
    folder = Path(args.results) / (f"{args.scale}-dry-run" if args.dry_run else args.scale)
    store = Store(ranks=str(folder / "AU_ranks"), records=str(folder / "records"))
    limit = args.limit or (DRY_LIMIT if args.dry_run else None)
    how = {"limit": limit, "batch_size": args.batch_size, "engine": args.engine}
    how |= {"toxicity": "embedded" if args.dry_run else args.toxicity, "attn": args.attn}
    checkpoints = tiny_checkpoints(specs.models(), folder / "checkpoints") if args.dry_run else None
    shared = {"data_dir": args.data_dir, "device": args.device, **({"encoder": "tfidf"} if args.dry_run else {})}
    read = partial(specs.read, args.scale, checkpoints=checkpoints, weights=args.weights, **shared, **how)

    selected = read(_names(args.only), _names(args.models), everything=args.all)
    if not selected:
        raise AUSteerError(f"nothing in scale {args.scale} matches --only and --models: --help lists the names")
    manifest = Manifest.resume(folder, args.scale, how, args.dry_run)
    manifest.everything |= args.all
    on_cores = args.scale == "embedded" or (args.scale == "real" and rmodels.check_device(args.device) == "cpu")
    if on_cores:
        torch.set_num_threads(
            1
        )  # models are small: a process per core does more than threads, which wait for each other
    selected_names = {spec.name for spec in selected}
    sources = [spec.source for spec in selected if spec.source and spec.source not in selected_names]
    computed = specs.with_sources(selected, read(sources, _names(args.models), everything=args.all) if sources else [])
    if args.estimate:
        print(estimate.text(computed, manifest))
        return None

    def publish(to: Manifest = manifest) -> Path:
        """Write the report of everything in the folder, not of this run alone."""
        names = {*manifest.entries, *manifest.panels, *selected_names} - set(sources)
        return page.write(read([name for name in specs.names() if name in names], everything=to.everything), to)

    executor = executor_for(args.jobs, args.ray, args.device, args.engine, tiny=on_cores)
    failed = compute(computed, manifest, store, executor, publish)
    manifest.count_orphans()
    report = publish()
    if args.keep:
        bundle(manifest, Path(args.keep))
        publish(Manifest.read(Path(args.keep)))
    for where, why in failed.items():
        print(f"FAILED {where.replace('|', ', ')}: {why}", file=sys.stderr)
    print(f"report: {report}   tables: {report.with_suffix('.md')}   records: {store.records}")
    if manifest.orphans:
        print(f"{manifest.orphans} records in {store.records} belong to no table: other code or options made them")
    return 1 if failed else None


def compute(
    selected: Sequence[Spec], manifest: Manifest, store: Store, executor: Executor, publish: Callable[[], object]
) -> dict[str, str]:
    """Compute all that is missing. Return what failed, and why."""
    in_tables = [cell for spec in selected for entry in spec.entries for cell in entry.cells]
    cells: list[Cell] = list(dict.fromkeys([*in_tables, *(cell.unsteered() for cell in in_tables)]))
    pictures: list[Panel] = [panel for spec in selected for panel in spec.panels]
    progress = Progress(selected, manifest, publish)
    try:
        for stage_cells, stage_pictures in _stages(selected[0], cells, pictures, executor.spreads):
            for cell, record in run_cells(stage_cells, store, executor):
                progress.add(cell, record)
            for panel, record in executor.map(partial(panels.attempt, store=store), stage_pictures, "figures"):
                progress.add(panel, record)
            progress.write()
            publish()
    finally:
        progress.write()
        executor.close()
    return progress.failed


def _stages(
    first: Spec, cells: Sequence[Cell], pictures: Sequence[Panel], spreads: bool
) -> list[tuple[list[Cell], list[Panel]]]:
    """Return what to compute, stage by stage.

    Where models are computed side by side, the first table comes before anything is ranked for the others, except for
    its rows that can wait. Where one model fills the machine, all its cells and pictures are one stage: it is loaded once.
    """
    if spreads:
        soon = {cell for entry in first.entries if not first.rows[entry.row].get("later") for cell in entry.cells}
        stages = [([cell for cell in cells if cell in soon], []), ([c for c in cells if c not in soon], list(pictures))]
    else:
        names = dict.fromkeys(one.model.name for one in (*cells, *pictures))
        stages = [
            ([cell for cell in cells if cell.model.name == name], [one for one in pictures if one.model.name == name])
            for name in names
        ]
    return [stage for stage in stages if any(stage)]


def _check(args: argparse.Namespace) -> None:
    if args.all and args.scale != "real":
        raise AUSteerError("--all is for --scale real: the other scales have no parts that wait for it")
    if args.plan:
        raise AUSteerError("--plan was renamed: use --estimate")
    if args.ray and args.device not in (None, "cpu"):
        raise AUSteerError("--ray assigns devices itself: drop --device (except cpu)")
    for name in ("limit", "jobs", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AUSteerError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    check_engine(args.engine, args.device, batch_size=args.batch_size, ray=args.ray, attn=args.attn)
    rmodels.check_device(args.device)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[arguments.attn_option()],
    )  # fmt: skip
    add = parser.add_argument
    add("--scale", default="embedded", choices=specs.SCALES,
        help="embedded (two cores, under half an hour), real (small real models, two cores, hours), small (one GPU of 24 GB), paper "
        "(default: %(default)s)")  # fmt: skip
    add("--only", default="", metavar="NAMES", help=f"only these, separated by commas: {', '.join(specs.names())}")
    add("--models", default="", metavar="NAMES", help=f"only these, separated by commas: {', '.join(specs.models())}")
    add("--weights", nargs="+", default=[], metavar="MODEL=FOLDER",
        help="read the weights of a model from this folder or GGUF file")  # fmt: skip
    add("--all", action="store_true", help="scale real: also the models, tasks and levels that take a GPU or a day")
    add(
        "--limit",
        type=int,
        help="use at most this many items per split, for a quick look; at scale real as many pairs, too",
    )
    add("--plan", action="store_true", help=argparse.SUPPRESS)  # the earlier name of --estimate
    add("--estimate", action="store_true", help="print the cells, what is done, memory and time; compute nothing")
    add(
        "--dry-run",
        action="store_true",
        help="use tiny random checkpoints of the same architectures, and two items per split unless --limit says otherwise",
    )
    add("--results", default="results", help="folder of results; each scale has its own inside (default: %(default)s)")
    add("--keep", metavar="DIR", help="write the report there too, with all records in one file, to be committed")
    add("--data-dir", help="folder of the paper's datasets (default: datasets/, then the hub)")
    add("--toxicity", default="local", metavar="SCORER", help="scorer of toxicity (docs/scoring.md; default: local)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--batch-size", type=int, help="prompts per batch (default: as many as fit)")
    add("--engine", default=LIVE, choices=ENGINES, help="what answers: the loaded model (live, default), or vLLM, where "
        "each plan becomes an adapter and a whole grid runs as one batch (needs .venv-vllm/bin/python; docs/serving.md); "
        "mixtures of experts and 4-bit models always answer live")  # fmt: skip
    add("--ray", metavar="ADDRESS", help="compute cells on a Ray cluster: HOST:PORT, auto or local (docs/scaling.md)")
    add(
        "--jobs",
        type=int,
        help="processes (default: one per core, at most 4, for the embedded models and for scale real on a CPU; else 1)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
