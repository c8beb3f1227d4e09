"""Overhead (Table 11): what a method takes before the first answer, and for each answer, one by one.

Trials go around the methods, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import mean, stdev

import torch

from austeer.evidence import Evidence
from austeer.methods.registry import METHODS
from austeer.steering import steer
from embedded.tasks import REPLY_WORDS
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from experiments.setting import Setting, load
from MFU_screening import screen

SHOWN = {"iti": "iti", "sadi": "sadi-head", "austeer": "published", "causal": "causal"}


def measure(setting: Setting, params: dict, progress: bool) -> dict:
    model, tokenizer, task = load(setting)
    items, trials = task.test[: params["items"]], params["trials"]
    if setting.embedded:
        question = Generation(REPLY_WORDS if task.name == "tone" else 1)
    else:
        question = Generation(task.tokens_for(model.config.model_type))
    kind, site = "small" if setting.embedded else "full", "attention"

    def ranks(momentum: str):
        return screen(task.pairs, model, tokenizer, [site], momentum=momentum, progress=False)[site]

    ranks("activation")  # one-time buffers of the libraries, which would be the first method's
    found: dict[str, dict] = {"vanilla": {}}
    plans = {"vanilla": None}
    for row, name in SHOWN.items():
        start = time.perf_counter()
        prepared = METHODS[name].prepare(Evidence(model, tokenizer, task.pairs, site, ranks))
        found[row] = {"prepare_s": time.perf_counter() - start}
        grid = METHODS[name].grid(kind)
        plans[row] = METHODS[name].plan(prepared, grid[len(grid) // 2])
    taken: dict[str, list[float]] = {row: [] for row in plans}
    prompts = [item.prompt for item in items]
    for trial in range(trials):
        for row in list(plans) if trial % 2 else list(plans)[::-1]:
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            start = time.perf_counter()
            with steer(model, plans[row]) if plans[row] is not None else nullcontext():
                LiveAnswerer(model, tokenizer).answer(prompts, question, batch_size=1)
            taken[row].append((time.perf_counter() - start) / len(items))
            if model.device.type == "cuda":  # a CPU's memory is the process's, and tells no method from another
                found[row]["gb"] = torch.cuda.max_memory_allocated(model.device) / 1e9
    for row, seconds in taken.items():
        spread = stdev(seconds) if trials > 1 else 0.0
        found[row] |= {"inference_s": mean(seconds) * len(items), "s_per_sample": mean(seconds), "std": spread}
    return found
