"""Share screening among the processes that `accelerate launch` started: each takes some pairs, and sums add up.

A process without others does everything itself. The launcher kills all processes when one dies, so a silent one is
merely slow: keep waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

T = TypeVar("T")
PATIENCE = timedelta(days=7)


def join(device: str | None, spread: bool = False) -> str | None:
    """Meet the other processes, if there are any, and return the device of this one; spread: the model takes several devices."""
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    return str(state.device) if state.num_processes > 1 and device is None and not spread else device


def alone() -> bool:
    return PartialState().num_processes == 1


def is_main() -> bool:
    return PartialState().is_main_process


def own_share(work: Sequence[T]) -> Sequence[T]:
    """Return this process's part of the work. Neighbours, which are alike, go to different processes."""
    state = PartialState()
    return work[state.process_index :: state.num_processes]


def add_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if not alone():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def flags_of_main(flags: Sequence[bool]) -> list[bool]:
    """Return the main process's flags in every process: other nodes may not see its disk."""
    if alone():
        return list(flags)
    told = torch.tensor(list(flags), dtype=torch.uint8, device=PartialState().device)
    distributed.broadcast(told, 0)
    return [bool(flag) for flag in told]
