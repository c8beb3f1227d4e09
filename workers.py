"""Many cells at once: over processes where models are tiny, one after another where one fills the machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import cells
from cells import Cell


def cores() -> int:
    return min(4, os.cpu_count() or 1)


def compute_all(todo: Sequence[Cell], jobs: int) -> dict[Cell, dict]:
    """The record of every cell, {"failed": why} for one that could not be computed. Unsteered ones first: the others
    build on them."""
    found: dict[Cell, dict] = {}
    with tqdm(total=len(todo), desc="cells", unit="cell") as bar:

        def done(cell: Cell, record: dict) -> None:
            found[cell] = record
            bar.set_postfix_str(str(cell)[:40])
            bar.update()

        waiting = []
        for cell in todo:
            record = cells.stored(cell)
            if record is not None:
                done(cell, record)
            else:
                waiting.append(cell)
        for unsteered in (True, False):
            now = [cell for cell in waiting if (cell.method in cells.UNSTEERED) == unsteered]
            for cell, record in _computed(now, jobs):
                done(cell, record)
    return found


def _computed(todo: Sequence[Cell], jobs: int):
    if jobs == 1 or len(todo) < 2:
        yield from ((cell, cells.attempt(cell)) for cell in todo)
        return
    with ProcessPoolExecutor(min(jobs, len(todo)), _context(), _start) as pool:
        running = {pool.submit(cells.attempt, cell): cell for cell in todo}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool:
                yield (
                    running[future],
                    {"failed": "its worker process was killed, perhaps for want of memory: run again"},
                )


def _context():
    """Workers fork from a process that has imported everything and run nothing: torch is in memory once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["cells"])
    return context


def _start() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise work, and then wait, for ever."""
    parent_process().join()
    os._exit(1)
