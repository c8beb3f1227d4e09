"""The whole paper: every table and figure of a scale, computed where it is missing, and the report.

bash reproduce.sh                                  the embedded models: everything, in minutes, on two cores
bash reproduce.sh --scale paper --plan             what the paper's models would take; computes nothing
bash reproduce.sh --scale paper --only table1 --models llama2-7b-chat
bash reproduce.sh --scale paper --dry-run          the real code paths, on tiny random checkpoints

To resume, run the same command: what is there is not computed again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import rmodels
from austeer import processes as shared_work
from austeer.errors import AUSteerError, one_line, run_command
from embedded import train as recipe_of
from experiments import run_cell as cells
from experiments.engines import vllm_batches as engine_batches
from experiments.engines.vllm_batches import ENGINES, LIVE
from experiments.executors import local as workers
from experiments.executors.over_ray import over_ray
from experiments.setting import EMBEDDED, UNSTEERED, Cell, Setting, unsteered
from paper import outlook, panels, specs
from paper.account import Account
from paper.dry_run import tiny_checkpoints
from paper.manifest import Manifest, bundle
from paper.render import page
from paper.specs import Spec

RECIPES = {"wide": ["--recipe", "wide"]}  # embedded models that are not shipped, by name: how they are trained


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _arguments(argv)
    args.device = shared_work.start(args.device)
    _check(args)
    transformers_logging.disable_progress_bar()
    folder = Path(args.results) / (f"{args.scale}-dry-run" if args.dry_run else args.scale)
    how = {"limit": 2 if args.dry_run else args.limit, "batch_size": args.batch_size, "engine": args.engine}
    how["toxicity"] = "embedded" if args.dry_run else args.toxicity
    instead = None
    if args.dry_run:
        instead = shared_work.of_first(lambda: tiny_checkpoints(specs.models(), folder / "checkpoints"))
    shared = {"records": str(folder / "records"), "ranks": str(folder / "AU_ranks")}
    shared |= {"data_dir": args.data_dir, "device": args.device, **({"encoder": "tfidf"} if args.dry_run else {})}

    def read(names: Sequence[str], of_models: Sequence[str] = ()) -> list[Spec]:
        return specs.read(args.scale, names, of_models, instead, **shared, **how)

    found = read(_names(args.only), _names(args.models))
    if not found:
        raise AUSteerError(f"nothing of that is in scale {args.scale}")
    manifest = Manifest.begun(folder, args.scale, how, args.dry_run)
    if args.plan:
        print(outlook.text(found, manifest))
        return None
    alone = args.engine == LIVE and shared_work.alone()  # an engine fills the machine by itself
    jobs = (args.jobs or (workers.cores() if args.scale == "embedded" else 1)) if alone else 1
    if args.scale == "embedded":
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    there = {spec.name for spec in found}
    sources = [spec.source for spec in found if spec.source and spec.source not in there]
    everything = [*found, *(read(sources, _names(args.models)) if sources else [])]
    failed = compute(everything, manifest, jobs, args.ray, args.jobs)
    if not shared_work.is_first():
        return 1 if failed else None
    # of all that is there, not of this run alone
    known = {*manifest.entries, *manifest.panels, *there} - set(sources)
    shown = read([name for name in specs.names() if name in known])
    written = page.write(shown, manifest)
    if args.keep:
        bundle(manifest, Path(args.keep))
        page.write(shown, Manifest.read(Path(args.keep)))
    for where, why in failed.items():
        print(f"FAILED {where.replace('|', ', ')}: {why}", file=sys.stderr)
    print(f"report: {written}   tables: {written.with_suffix('.md')}   records: {folder / 'records'}")
    return 1 if failed else None


def _check(args: argparse.Namespace) -> None:
    if args.ray and (args.device not in (None, "cpu") or not shared_work.alone()):
        raise AUSteerError("--ray gives every cell a device: without --device (other than cpu) and accelerate launch")
    for name in ("limit", "jobs", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AUSteerError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    engine_batches.check(args.engine, args.device, batch_size=args.batch_size, ray=args.ray)
    rmodels.check_device(args.device)


def compute(
    found: Sequence[Spec], manifest: Manifest, jobs: int, ray: str | None = None, on_ray: int | None = None
) -> dict[str, str]:
    """Everything that is missing, one model after another. Returns what failed, and why."""
    todo = list(dict.fromkeys(cell for spec in found for entry in spec.entries for cell in entry.cells))
    asked = [panel for spec in found for panel in spec.panels]
    models = list(dict.fromkeys([*(cell.setting.model for cell in todo), *(panel.setting.model for panel in asked)]))
    untrained = {cell.setting.checkpoint: cell.setting for cell in todo if _is_untrained(cell.setting)}
    if jobs > 1:  # of tiny models, which stay loaded: all at once, but those that are trained meanwhile
        now = {one.setting.model for one in (*todo, *asked) if one.setting.checkpoint not in untrained}
        stages = [now, set(models) - now]
    else:
        stages = [{model} for model in models]
    account = Account(found, manifest)
    with workers.beside(train, list(untrained.values())) if untrained and jobs > 1 else nullcontext([]) as training:
        for stage in stages:
            waited = _trained(training, untrained.values(), stage)
            mine = [cell for cell in todo if cell.setting.model in stage]
            if waited:
                made = ((cell, {"failed": waited}) for cell in mine)
            else:
                made = over_ray(mine, ray, on_ray) if ray else _ranked_and_computed(mine, jobs)
            for cell, record in made:
                account.cell(cell, record)
            pictures = [panel for panel in asked if panel.setting.model in stage]
            known = workers.known(panels.stored, pictures)
            missing = [panel for panel in pictures if panel not in known]
            for panel, record in chain(known.items(), workers.attempted(panels.attempt, missing, jobs, "figures")):
                account.panel(panel, record)
            account.write()
    return account.failed


def _trained(training: Sequence[Future], untrained: Iterable[Setting], stage: set[str]) -> str:
    """Waits for the models of this stage, or trains them; why that failed, or nothing."""
    try:
        mine = [setting for setting in untrained if setting.model in stage]
        if mine and not training:
            shared_work.of_first(lambda: [train(setting) for setting in mine])
        if any(not one.done() for one in training if mine):
            print(f"waiting for the training of {', '.join(sorted(stage))}", file=sys.stderr)
        for one in training if mine else []:
            one.result()
    except Exception as error:
        return f"its model could not be trained: {one_line(error)}"
    return ""


def _ranked_and_computed(todo: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict]]:
    """Ranks first, once for all cells that share them; what cannot be ranked fails with that reason."""
    there = workers.known(cells.stored, todo)
    yield from there.items()
    todo = [cell for cell in todo if cell not in there]
    shared = [Ranking(setting, tuple(mine)) for setting, mine in by_pairs(todo).items()]
    failed = {}
    for ranking, told in workers.attempted(rank, shared, jobs, "ranking"):
        failed |= {cell: told for cell in ranking.cells if "failed" in told}
    yield from failed.items()
    yield from workers.compute_missing([cell for cell in todo if cell not in failed], jobs)


def by_pairs(todo: Sequence[Cell]) -> dict[Setting, list[Cell]]:
    """Cells that share their ranks, by what they share."""
    found: dict[Setting, list[Cell]] = {}
    for cell in todo:
        if cell.method not in UNSTEERED:
            found.setdefault(unsteered(cell.setting), []).append(cell)
    return found


@dataclass(frozen=True)
class Ranking:
    """What has to be ranked for these cells, which share it."""

    setting: Setting
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        return f"{self.setting.task_name} of {Path(self.setting.model).name}"


def rank(ranking: Ranking) -> dict:
    """Ranks that are missing: {"made": how many}, or {"failed": why}."""
    try:
        return {"made": shared_work.together(lambda: cells.prepare(ranking.setting, ranking.cells))}
    except Exception as error:
        return {"failed": one_line(error)}


def _is_untrained(setting: Setting) -> bool:
    """One of the embedded models that are made by their recipe and not shipped."""
    made = (Path(setting.checkpoint) / "record.json").exists()
    return setting.embedded and setting.model.removeprefix(f"{EMBEDDED}-") in RECIPES and not made


def train(setting: Setting) -> None:
    recipe = RECIPES[setting.model.removeprefix(f"{EMBEDDED}-")]
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its bar would run through the others
        recipe_of.main(["--task", setting.task, *recipe, "--out", setting.checkpoint])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", default="embedded", choices=specs.SCALES,
        help="embedded (two cores), small (one GPU of 24 GB), paper (default: %(default)s)")  # fmt: skip
    add("--only", default="", metavar="NAMES", help=f"of {','.join(specs.names())}")
    add("--models", default="", metavar="NAMES", help=f"of {','.join(specs.models())}")
    add("--limit", type=int, help="at most this many items a split: a quick look")
    add("--plan", action="store_true", help="print cells, what is done, memory and time; compute nothing")
    add("--dry-run", action="store_true", help="tiny random checkpoints of the same architectures, two items a split")
    add("--results", default="results", help="folder; a scale has its own in it (default: %(default)s)")
    add("--keep", metavar="DIR", help="put the report there too, with all records in one file: for a repository")
    add("--data-dir", help="folder of the paper's datasets (default: datasets/, then the hub)")
    add("--toxicity", default="local", metavar="SCORER", help="who scores toxicity (docs/scoring.md; default: local)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--batch-size", type=int, help="prompts at once (default: as many as fit)")
    add("--engine", default=LIVE, choices=ENGINES, help="who answers: the model itself, or vLLM with every plan as an "
        "adapter, a whole grid in one batch (by .venv-vllm/bin/python; docs/serving.md); mixtures of experts and 4-bit "
        "models always answer themselves")  # fmt: skip
    add(
        "--ray",
        metavar="ADDRESS",
        help="compute cells on a Ray cluster: its HOST:PORT, auto or local (docs/scaling.md)",
    )
    add("--jobs", type=int, help="processes (default: one a core for the embedded models, else 1)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
