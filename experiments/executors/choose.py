"""Choose the executor that a command line asks for."""

from __future__ import annotations

from experiments.cell import LIVE
from experiments.executors.base import Executor
from experiments.executors.local import LocalExecutor, cores
from experiments.executors.over_ray import RayExecutor


def executor_for(jobs: int | None, ray: str | None, device: str | None, engine: str, tiny: bool) -> Executor:
    """Return Ray's executor if an address is given, else a local one: a pool where models are tiny, else one process."""
    if ray:
        return RayExecutor(ray, jobs, device)
    if engine != LIVE:  # an engine fills the machine
        return LocalExecutor(1)
    return LocalExecutor(jobs or (cores() if tiny else 1))
