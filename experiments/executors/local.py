"""Many cells, or panels of figures, at once: over processes where models are tiny, one after another where one fills the machine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import TypeVar

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from austeer import processes as shared_work
from experiments import run_cell as cells
from experiments.setting import UNSTEERED, Cell

Job = TypeVar("Job")  # hashable, and what `attempt` needs to know


def cores() -> int:
    return min(4, os.cpu_count() or 1)


def compute_all(todo: Sequence[Cell], jobs: int) -> dict[Cell, dict]:
    """The record of every cell, {"failed": why} for one that could not be computed."""
    found = known(cells.stored, todo)
    return found | dict(compute_missing([cell for cell in todo if cell not in found], jobs))


def compute_missing(todo: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict]]:
    """Unsteered ones first: the others build on them."""
    yield from attempted(cells.attempt, [cell for cell in todo if cell.method in UNSTEERED], jobs, "unsteered")
    yield from attempted(cells.attempt, [cell for cell in todo if cell.method not in UNSTEERED], jobs, "steered")


def known(stored: Callable[[Job], dict | None], todo: Sequence[Job]) -> dict[Job, dict]:
    """What is there already. What cannot even be looked for is left to be attempted, and fails there with its reason."""
    found = {}
    for job in tqdm(todo, desc="looking for what is there", unit="cell", leave=False, disable=None):
        with suppress(Exception):
            # what fails in the first process alone must fail in all, or they would be out of step from here on
            record = shared_work.together(lambda job=job: stored(job))
            if record is not None:
                found[job] = record
    return found


def attempted(attempt: Callable[[Job], dict], todo: Sequence[Job], jobs: int, what: str) -> Iterator[tuple[Job, dict]]:
    """Jobs and their records, as they are made."""
    on_terminal = sys.stderr.isatty()
    with tqdm(total=len(todo), desc=what, unit="cell", disable=not todo or not on_terminal) as bar:
        for count, (job, record) in enumerate(_attempted(attempt, todo, jobs), start=1):
            yield job, record
            bar.set_postfix_str(str(job)[:40])
            bar.update()
            if not on_terminal:  # a log is read by lines
                print(
                    f"{what} {count}/{len(todo)} {str(job)[:100]} {record.get('failed', '')}".rstrip(), file=sys.stderr
                )


@contextmanager
def beside(work: Callable, jobs: Sequence) -> Iterator[list[Future]]:
    """`work` of every job in one process of its own, beside what is done inside the `with`."""
    with ProcessPoolExecutor(1, _context(), _start) as pool:
        yield [pool.submit(work, job) for job in jobs]


def _attempted(attempt: Callable[[Job], dict], todo: Sequence[Job], jobs: int) -> Iterator[tuple[Job, dict]]:
    if jobs == 1 or len(todo) < 2:
        yield from ((job, attempt(job)) for job in todo)
        return
    left = list(todo)
    for again in (True, False):  # a killed worker takes the whole pool with it: a second one goes on
        with ProcessPoolExecutor(min(jobs, len(left) or 1), _context(), _start) as pool:
            running, left = {pool.submit(attempt, job): job for job in left}, []
            for future in as_completed(running):
                try:
                    yield running[future], future.result()
                except BrokenProcessPool:
                    if again:
                        left.append(running[future])
                    else:
                        yield running[future], {"failed": "its worker was killed twice, perhaps for want of memory"}
        if not left:
            return


def _context():
    """Workers fork from a process that has imported everything and run nothing: torch is in memory once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["experiments.run_cell"])
    return context


def _start() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise work, and then wait, for ever."""
    parent_process().join()
    os._exit(1)
