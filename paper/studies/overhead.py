"""Overhead (Table 11): memory and time of a method before its first answer, and of its answers, one by one.

params: items (time at most this many test items), trials.

The methods take turns in every trial, so that other load on the machine falls on all of them alike. Memory is the peak
of what torch allocated on all GPUs, the model included; on a CPU torch does not count it, so there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from austeer.evidence import Evidence
from austeer.methods.registry import METHODS
from austeer.steering import steer
from eval.answering.live import LiveAnswerer
from experiments.bench import Bench
from MFU_screening import screen
from paper.studies.ranks import n_ranking_prompts

METHOD_OF_ROW = {"iti": "iti", "sadi": "sadi-head", "austeer": "published", "causal": "causal"}


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    items, trials = task.test[: params["items"]], params["trials"]
    answerer, site, device = LiveAnswerer(model, tokenizer), "attention", model.device
    generation = task.generation(answerer, items)

    def ranks(momentum: str):
        return screen(task.pairs, model, tokenizer, [site], momentum=momentum, progress=False)[site]

    ranks("activation")  # fills one-time buffers of the libraries, which the first method would pay for
    methods: dict[str, dict] = {"vanilla": {"prepare_s": None, "prepare_gb": None}}
    plans = {"vanilla": None}
    for row, name in METHOD_OF_ROW.items():
        evidence = Evidence(model, tokenizer, task.pairs, site, ranks)
        prepared, seconds, peak = _measured(device, partial(METHODS[name].prepare, evidence))
        methods[row] = {"prepare_s": seconds, "prepare_gb": peak}
        grid = METHODS[name].grid(bench.grid_kind)
        plans[row] = METHODS[name].plan(prepared, grid[len(grid) // 2])
    for one in methods.values():
        one |= {"s_per_sample": [], "gb": None}  # seconds in every trial
    prompts = [item.prompt for item in items]
    answer = partial(answerer.answer, prompts, generation, batch_size=1)
    for trial in range(trials):
        for row in list(plans) if trial % 2 else list(plans)[::-1]:
            with steer(model, plans[row]) if plans[row] is not None else nullcontext():
                _, seconds, peak = _measured(device, answer)
            methods[row]["s_per_sample"].append(seconds / len(items))
            methods[row]["gb"] = peak
    return {"pairs": len(task.pairs), "items": len(items), "test": len(task.test), "methods": methods}


def _measured(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """Return what the work returns, its seconds, and the peak of its GPU memory in GB (None on a CPU)."""
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    result = work()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - start
    return result, seconds, sum(map(torch.cuda.max_memory_allocated, gpus)) / 1e9 if gpus else None


def n_answers(params: dict) -> int:
    return params["items"] * params["trials"] * (len(METHOD_OF_ROW) + 1)


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return n_answers(params) + 3 * n_ranking_prompts("activation", n_pairs)
