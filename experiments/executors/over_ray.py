"""Many cells over a cluster, through Ray: a cell is a task, with a GPU of its own where there are any.

    python main.py --ray local --jobs 4 ...      # the cores or GPUs of this machine
    python main.py --ray HOST:6379 ...           # a cluster that `ray start` made: docs/scaling.md

Ray only says who computes what: ranks, records and answers go to the folders that all share, where a cell is found
again. A cell whose worker died is computed by another, which goes on where answers had come to.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from austeer.errors import AUSteerError, one_line
from experiments import run_cell as cells
from experiments.executors import local as workers
from experiments.setting import UNSTEERED, Cell, Setting, asked_once, unsteered

RETRIES = 3  # of a cell whose worker died: one that fills any memory should not kill workers for ever


def over_ray(todo: Sequence[Cell], address: str, jobs: int | None = None) -> Iterator[tuple[Cell, dict]]:
    """Cells with their records as they come, {"failed": why} for one that could not be computed."""
    ray = _connect(address, jobs)
    try:
        with tqdm(total=len(todo), desc="cells", unit="cell", disable=None) as bar:
            for cell, record in _computed(ray, todo):
                bar.set_postfix_str(str(cell)[:40])
                bar.update()
                yield cell, record
    finally:
        ray.shutdown()


def _connect(address: str, jobs: int | None):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: nothing is reported to anyone
    if address == "local":  # Ray's ports take no orders without this token, which ends with the run
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex())
    try:
        import ray
    except ImportError:
        raise AUSteerError("--ray needs Ray: pip install -r requirements2.txt") from None
    try:
        if address == "local":
            limits = {"task_oom_retries": RETRIES}
            ray.init("local", num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                     _system_config=limits)  # fmt: skip
        else:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise AUSteerError(f"no Ray cluster at {address} ({one_line(error)}); docs/scaling.md starts one") from error
    return ray


def _computed(ray, todo: Sequence[Cell]) -> Iterator[tuple[Cell, dict]]:
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0 and all(cell.setting.device != "cpu" for cell in todo)
    # on a GPU every cell is a new process, so that the one before has surely left its memory
    needs = {"num_cpus": 1, **({"num_gpus": 1, "max_calls": 1} if on_gpu else {})}
    look, prepare, attempt = (ray.remote(max_retries=RETRIES, **needs)(task) for task in (_known, _prepare, _attempt))
    folder = os.getcwd()
    # what is there is looked for once a model, and not by every cell in a process of its own
    for there in [look.remote(folder, mine) for mine in _by_model(todo)]:
        with suppress(ray.exceptions.RayError):  # then its cells are attempted, and say why
            found = ray.get(there)
            yield from found.items()
            todo = [cell for cell in todo if cell not in found]
    shared = {}  # what several settings share is computed once

    def computed_unsteered(cell: Cell):
        once = asked_once(cell.setting, cell.method)
        if once not in shared:
            shared[once] = attempt.remote(folder, once)
        return shared[once]

    running: dict[object, list[Cell]] = {}
    for setting in dict.fromkeys(unsteered(cell.setting) for cell in todo):  # cells that share their ranks
        own = [cell for cell in todo if unsteered(cell.setting) == setting]
        steered = [cell for cell in own if cell.method not in UNSTEERED]
        for cell in own:
            if cell.method in UNSTEERED:
                running.setdefault(computed_unsteered(cell), []).append(cell)
        if steered:
            before = prepare.remote(folder, setting, own), computed_unsteered(Cell(setting, "vanilla"))
            running |= {attempt.remote(folder, cell, *before): [cell] for cell in steered}
    while running:
        (done,), _ = ray.wait(list(running))
        try:
            record = ray.get(done)
        except ray.exceptions.RayError as error:
            record = {"failed": one_line(getattr(error, "cause", None) or error)}
        yield from ((cell, record) for cell in running.pop(done))


def _by_model(todo: Sequence[Cell]) -> list[list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in todo:
        found.setdefault(cell.setting.model, []).append(cell)
    return list(found.values())


def _known(folder: str, todo: Sequence[Cell]) -> dict[Cell, dict]:
    _enter(folder)
    return workers.known(cells.stored, todo)


def _prepare(folder: str, setting: Setting, todo: Sequence[Cell]) -> dict:
    _enter(folder)
    try:
        return {"made": cells.prepare(setting, todo)}
    except Exception as error:
        return {"failed": one_line(error)}


def _attempt(folder: str, cell: Cell, *before: dict) -> dict:
    """Ray waits for what must be there before."""
    _enter(folder)
    failed = next((told for told in before if "failed" in told), None)
    return {"failed": f"not begun: {failed['failed']}"} if failed else cells.attempt(cell)


def _enter(folder: str) -> None:
    """Relative paths mean what they mean to who started all this."""
    if not Path(folder).is_dir():
        raise AUSteerError(f"{os.uname().nodename} does not see {folder}: the checkout must be on a shared folder")
    os.chdir(folder)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # what was asked of Ray
