"""What every method costs on an embedded model: preparation, memory, time per token, AUs steered.

    python benchmarks/methods.py [--task svamp] [--method NAME ...] [--out benchmarks/results/methods-cpu.json]

Every method prepares on the task's pairs in a process of its own, and makes the ranks it needs anew. Time per token is
a ratio from one run: the model with the plan live against the same model idle, in turn. (What longer prompts cost is not
in it.) `touched` counts the AUs of the last grid point, the strongest one; memory is the peak above the loaded model (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from figures import keep, markdown
from transformers.utils import logging as transformers_logging

from austeer.change import Change, applied
from austeer.errors import AUSteerError, run_command
from austeer.evidence import Evidence
from austeer.methods.base import Method, sites_of
from austeer.methods.registry import METHODS
from eval.tasks.embedded import EmbeddedTask
from experiments.bench import BENCHES, Bench
from experiments.cell import EMBEDDED, bench_of
from experiments.costs import costs_of
from experiments.store import Store
from MFU_screening import screen

TOKENS = 300


def measure(method: Method, bench: Bench) -> dict:
    """Measure a method at the first of its sites; run this in a process of its own."""
    model, tokenizer, site = bench.model, bench.tokenizer, method.sites[0]

    def ranks(momentum: str, at: str = site, pairs=bench.task.pairs):
        return screen(pairs, model, tokenizer, [at], momentum=momentum, progress=False)[at]

    # fills one-time buffers of the libraries, forwards and backwards
    ranks("causal", (*sites_of(site), "attention")[0], bench.task.pairs[:2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of loading
    before, start = memory_mb("VmRSS"), time.perf_counter()
    prepared = method.prepare(Evidence(model, tokenizer, bench.task.pairs, site, ranks, costs=costs_of(bench)))
    change = method.plan(prepared, method.grid("small")[-1])  # timed, too, since causal-greedy does its work here
    seconds, peak = time.perf_counter() - start, memory_mb("VmHWM")
    return {
        "site": site,
        "prepare_s": round(seconds, 2),
        "memory_mb": round(peak - before, 1),
        "time_per_token": round(time_per_token(model, change), 3),
        "touched": 0 if change is None else len(change.aus()),
        "trains": method.trains,
        "foldable": method.foldable,
    }


def memory_mb(field: str) -> float:
    # not getrusage: after a fork its peak is the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@torch.inference_mode()
def time_per_token(model, change: Change | None) -> float:
    """Return CPU time per token, live over idle, decoding in turn, so that other load on the machine cancels."""
    prompt = torch.randint(3, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(2))
    ratios = []
    for turn in range(TOKENS // 50):
        seconds = {}
        for live in (False, True) if turn % 2 else (True, False):
            with applied(model, change if live else None):
                cache = model(prompt, use_cache=True).past_key_values
                start = time.process_time()
                for token in range(50):
                    cache = model(torch.tensor([[3 + token]]), past_key_values=cache, use_cache=True).past_key_values
                seconds[live] = time.process_time() - start
        ratios.append(seconds[True] / seconds[False])
    return median(ratios)


def measure_in_process(name: str, task: str) -> dict:
    command = [sys.executable, __file__, "--one", "--method", name, "--task", task]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        return {"error": (process.stderr.strip().splitlines() or ["failed"])[-1]}
    return json.loads(process.stdout)


def table(rows: dict[str, dict]) -> str:
    head = ["method", "site", "prepare, s", "memory, MB", "time per token", "touched", "trains", "foldable"]
    yes_no, lines = {True: "yes", False: "no"}, []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        costs = [f"{row['prepare_s']:.1f}", f"{row['memory_mb']:.0f}", f"{row['time_per_token']:.2f}"]
        lines.append([name, row["site"], *costs, str(row["touched"]), yes_no[row["trains"]], yes_no[row["foldable"]]])
    return markdown(head, lines, words=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="svamp", help="task of the embedded models (default: %(default)s)")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    task = EmbeddedTask(args.task)  # a wrong name is an error before anything runs
    if args.one:
        with TemporaryDirectory() as folder:
            bench = BENCHES.open(*bench_of(model=EMBEDDED, task=args.task, device="cpu"), Store(folder, folder))
            print(json.dumps(measure(METHODS[args.method[0]], bench)))
        return
    rows = {name: measure_in_process(name, args.task) for name in args.method}
    print(table(rows))
    if args.out:
        figures = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1, "task": args.task}
        figures |= {"pairs": len(task.pairs), "methods": rows}
        keep(figures, args.out)
    if any("error" in row for row in rows.values()):
        raise AUSteerError("some methods failed: the table shows their errors")


if __name__ == "__main__":
    run_command(main)
