"""Run jobs on this machine: in a pool of processes where models are tiny, else one after another in this process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from experiments.bench import BENCHES
from experiments.executors.base import Executor, Job


def cores() -> int:
    return min(4, os.cpu_count() or 1)


class LocalExecutor(Executor):
    def __init__(self, processes: int = 1):
        self.processes, self.spreads = processes, processes > 1

    def map(self, work: Callable[[Job], dict], jobs: Sequence[Job], what: str) -> Iterator[tuple[Job, dict]]:
        on_terminal = sys.stderr.isatty()
        with tqdm(total=len(jobs), desc=what, unit="job", disable=not jobs or not on_terminal) as bar:
            for count, (job, result) in enumerate(self._map(work, jobs), start=1):
                yield job, result
                label = "" if isinstance(job, tuple) else str(job)[:100]
                bar.set_postfix_str(label[:40])
                bar.update()
                if not on_terminal:  # in a log, lines instead of a bar
                    line = f"{what} {count}/{len(jobs)} {label} {result.get('failed', '')}"
                    print(" ".join(line.split()), file=sys.stderr)

    def close(self) -> None:
        BENCHES.close()

    def _map(self, work: Callable[[Job], dict], jobs: Sequence[Job]) -> Iterator[tuple[Job, dict]]:
        if self.processes == 1 or len(jobs) < 2:
            yield from ((job, work(job)) for job in jobs)
            return
        jobs_left = list(jobs)
        for is_first_try in (True, False):  # a killed worker takes the whole pool with it: a second pool continues
            with ProcessPoolExecutor(min(self.processes, len(jobs_left)), _context(), _start_worker) as pool:
                running, jobs_left = {pool.submit(work, job): job for job in jobs_left}, []
                for future in as_completed(running):
                    try:
                        yield running[future], future.result()
                    except BrokenProcessPool:
                        if is_first_try:
                            jobs_left.append(running[future])
                        else:
                            yield (
                                running[future],
                                {"failed": "its worker was killed twice, perhaps for lack of memory: try fewer --jobs"},
                            )
            if not jobs_left:
                return


def _context():
    """Fork workers from a process that has imported everything and run nothing, so that torch is in memory only once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["experiments.executors.base"])
    return context


def _start_worker() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would otherwise finish its job and then wait forever."""
    parent_process().join()
    os._exit(1)
