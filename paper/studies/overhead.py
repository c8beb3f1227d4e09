"""Overhead (Table 11): the time of a method before its first answer, and per answer, one by one.

The methods take turns in every trial, so that other load on the machine falls on all of them alike.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import mean, stdev

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
    answerer, site = LiveAnswerer(model, tokenizer), "attention"
    generation = task.generation(answerer, items)

    def ranks(momentum: str):
        return screen(task.pairs, model, tokenizer, [site], momentum=momentum, progress=False)[site]

    ranks("activation")  # fills one-time buffers of the libraries, which the first method would pay for
    result: dict[str, dict] = {"vanilla": {}}
    plans = {"vanilla": None}
    for row, name in METHOD_OF_ROW.items():
        start = time.perf_counter()
        prepared = METHODS[name].prepare(Evidence(model, tokenizer, task.pairs, site, ranks))
        result[row] = {"prepare_s": time.perf_counter() - start}
        grid = METHODS[name].grid(bench.grid_kind)
        plans[row] = METHODS[name].plan(prepared, grid[len(grid) // 2])
    times: dict[str, list[float]] = {row: [] for row in plans}
    prompts = [item.prompt for item in items]
    for trial in range(trials):
        for row in list(plans) if trial % 2 else list(plans)[::-1]:
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            start = time.perf_counter()
            with steer(model, plans[row]) if plans[row] is not None else nullcontext():
                answerer.answer(prompts, generation, batch_size=1)
            times[row].append((time.perf_counter() - start) / len(items))
            if model.device.type == "cuda":  # on a CPU only the whole process's memory is known
                result[row]["gb"] = torch.cuda.max_memory_allocated(model.device) / 1e9
    for row, seconds in times.items():
        spread = stdev(seconds) if trials > 1 else 0.0
        result[row] |= {"inference_s": mean(seconds) * len(items), "s_per_sample": mean(seconds), "std": spread}
    return result


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    answers = params["items"] * params["trials"] * (len(METHOD_OF_ROW) + 1)
    return answers + 3 * n_ranking_prompts("activation", n_pairs)
