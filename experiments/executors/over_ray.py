"""Run jobs on a Ray cluster: a job is a Ray task, with a GPU of its own where there are any.

    python main.py --ray local --jobs 4 ...      # the cores or GPUs of this machine
    python main.py --ray HOST:6379 ...           # a cluster that `ray start` made: docs/scaling.md

Ray only assigns jobs: ranks, records and answers go to folders that all nodes share, where finished cells are found
again. When a worker dies, another takes its job and continues from the answers stored so far.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from austeer.errors import AUSteerError, one_line
from experiments.executors.base import Executor, Job

RETRIES = 3  # how often a job whose worker died is tried again: one that fills any memory must not kill workers forever


class RayExecutor(Executor):
    def __init__(self, address: str, processes: int | None = None, device: str | None = None):
        self.ray = _connect(address, processes)
        on_gpu = self.ray.cluster_resources().get("GPU", 0) > 0 and device != "cpu"
        # on GPUs every job is a new process, so that the previous job's memory is free for certain
        self.needs = {"num_cpus": 1, **({"num_gpus": 1, "max_calls": 1} if on_gpu else {})}

    def map(self, work: Callable[[Job], dict], jobs: Sequence[Job], what: str) -> Iterator[tuple[Job, dict]]:
        task = self.ray.remote(max_retries=RETRIES, **self.needs)(_in_folder)
        running = {task.remote(os.getcwd(), work, job): job for job in jobs}
        with tqdm(total=len(jobs), desc=what, unit="job", disable=None if jobs else True) as bar:
            while running:
                (future,), _ = self.ray.wait(list(running))
                try:
                    result = self.ray.get(future)
                except self.ray.exceptions.RayError as error:
                    result = {"failed": one_line(getattr(error, "cause", None) or error)}
                job = running.pop(future)
                bar.update()
                yield job, result

    def close(self) -> None:
        self.ray.shutdown()


def _connect(address: str, processes: int | None):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: nothing is reported to anyone
    if address == "local":  # without this token, which ends with the run, whoever reaches Ray's ports could run code
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex())
    try:
        import ray
    except ImportError:
        raise AUSteerError("--ray needs Ray: pip install -r requirements2.txt") from None
    try:
        if address == "local":
            limits = {"task_oom_retries": RETRIES}
            ray.init("local", num_cpus=processes, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                     _system_config=limits)  # fmt: skip
        else:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise AUSteerError(
            f"no Ray cluster at {address} ({one_line(error)}); docs/scaling.md says how to start one"
        ) from error
    return ray


def _in_folder(folder: str, work: Callable[[Job], dict], job: Job) -> dict:
    """Do a job in the folder of the command that asked for it, so that relative paths mean the same."""
    if not Path(folder).is_dir():
        raise AUSteerError(
            f"{os.uname().nodename} cannot see {folder}: put the checkout on a folder that all nodes share"
        )
    os.chdir(folder)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # Ray reserved one core
    return work(job)
