"""One job shared by the processes that `accelerate launch` started: each does its part, and all know the whole.

Every process loads the model on its own device and runs the same program. It does its share of the pieces; what all
found is put together in the order of one process alone, so that all take the same choices. What reads or writes
files, and what scores answers, is done by the first, which tells the others. A process without others does everything itself.

What is told is JSON or safetensors, as bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from safetensors.torch import load, save
from torch import Tensor, distributed

from austeer.errors import AUSteerError, one_line

T = TypeVar("T")
# the launcher ends all processes when one is dead: one that is not heard of is only slow
PATIENCE = timedelta(days=7)


class FailedTogether(AUSteerError):
    """Raised in every process at once."""


def start(device: str | None) -> str | None:
    """Find the other processes, if there are any. Returns the device of this one."""
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes == 1:
        return device
    if device not in (None, "cpu", "cuda"):
        raise AUSteerError(f"--device {device}: of several processes each takes a device of its own; leave it out")
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # for the life of the process  # noqa: SIM115
    return "cpu" if state.device.type == "cpu" else str(state.device)


def alone() -> bool:
    return PartialState().num_processes == 1


def is_first() -> bool:
    return PartialState().is_main_process


def share(work: Sequence[T]) -> Sequence[T]:
    """This process's pieces. Neighbours, which are alike, go to different ones."""
    state = PartialState()
    return work[state.process_index :: state.num_processes]


def each(do: Callable[[T], Any], work: Sequence[T]) -> list:
    """`do` of every piece, in order; the pieces are shared."""
    mine = [do(piece) for piece in share(work)]
    if alone():
        return mine
    parts = _told("each", mine)
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(work))]


def merged(mine: Iterable) -> Iterator:
    """What this and all other processes make, as it comes: in rounds of one from each."""
    if alone():
        yield from mine
        return
    mine = iter(mine)
    while any(found := _told("merged", list(islice(mine, 1)))):
        for part in found:
            yield from part


def of_first(do: Callable[[], T]) -> T:
    """Done by the first, and told to all."""
    if alone():
        return do()
    told = _exchange("of the first", json.dumps(do()).encode() if is_first() else b"")
    return json.loads(told[0])


def tensors_of_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On GPUs two processes may compute the same to other last digits."""
    if alone():
        return tensors
    payload = save({name: tensor.contiguous() for name, tensor in tensors.items()}) if is_first() else b""
    return load(_exchange("tensors of the first", payload)[0])


def all_say(yes: bool) -> bool:
    return yes if alone() else all(_told("all say", yes))


def together(do: Callable[[], T]) -> T:
    """What fails in one process fails in all; else the others would wait for it, or go on to something else.

    Not within itself.
    """
    if alone():
        return do()
    try:
        result = do()
        _exchange("done")
        return result
    except FailedTogether:
        raise
    except Exception as error:
        with suppress(FailedTogether):
            _exchange("failed", failure=one_line(error))
        raise


def _told(step: str, value: Any) -> list:
    return [json.loads(payload) for payload in _exchange(step, json.dumps(value).encode())]


def _exchange(step: str, payload: bytes = b"", failure: str | None = None) -> list[bytes]:
    """The payloads of all processes, in their order. All meet here, also one that gives up."""
    state = PartialState()
    head = json.dumps({"step": step, "failure": failure}).encode()
    mine = torch.frombuffer(bytearray(head + b"\n" + payload), dtype=torch.uint8).to(state.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=state.device) for _ in range(state.num_processes)]
    distributed.all_gather(lengths, torch.tensor([len(mine)], device=state.device))
    heads, payloads = [], []
    for process, length in enumerate(lengths):
        message = mine if process == state.process_index else mine.new_empty(int(length))
        distributed.broadcast(message, process)
        line, _, rest = message.cpu().numpy().tobytes().partition(b"\n")
        heads.append(json.loads(line))
        payloads.append(rest)
    failures = [f"process {process}: {head['failure']}" for process, head in enumerate(heads) if head["failure"]]
    if failures:
        raise FailedTogether(failures[0])
    if len({head["step"] for head in heads}) > 1:
        raise FailedTogether(f"the processes are out of step: {', '.join(head['step'] for head in heads)}")
    return payloads
