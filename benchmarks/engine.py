"""Throughput of vLLM with many plans at once, as ratios to the unsteered model of the same run.

    .venv-vllm/bin/python benchmarks/engine.py [--dtype float32] [--repeats 2] [--out FILE.json]

The model is a random Llama (hidden 512, 8 layers, as in core.py). It gets 64 requests of 32 prompt and 32 new tokens, all
at once, under 0, 1, 16 or 64 distinct plans of 25 AUs at the attention site (as dense as 100 over 32 layers). "lora off"
is the same model in an engine that was started without adapters, as a server that never steers.

256 requests under 256 distinct plans are compared with 256 unsteered ones in the same engine, in two ways. vLLM never
runs more plans at once than it has slots (max_loras): requests of further plans wait, and a plan whose slot is taken over
stays in CPU memory (max_cpu_loras). "over 64 slots" uses the engine of the 64 requests, as a server would be started: 64
requests run at any time, and plans take over slots. "at once" uses 256 slots in an engine that runs 256 requests.

On a CPU, seconds are CPU time on one thread, which other load on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

import torch
from core import VOCABULARY, build
from figures import keep, show

import rmodels
from austeer.export.lora import max_lora_rank, save_lora
from austeer.plan import Plan

REQUESTS, MANY = 64, 256
PROMPT, NEW, UNITS = 32, 32, 25
DISTINCT = (1, 16, 64)
UNSTEERED = "unsteered"


def plans(model, count: int) -> list[Plan]:
    shape, result = rmodels.site_shape(model, "attention"), []
    for seed in range(count):
        scales = torch.zeros(shape)
        chosen = torch.randperm(scales.numel(), generator=torch.Generator().manual_seed(seed))[:UNITS]
        scales.view(-1)[chosen] = 1.0
        result.append(Plan({"attention": scales}))
    return result


def requests_under(plans: list, count: int) -> list:
    """Return the plan of each of `count` requests, taking the plans in turn; None without any plans."""
    return [plans[i % len(plans)] if plans else None for i in range(count)]


def tokens_per_second(engine, requests: dict[str, list], repeats: int) -> dict[str, float]:
    """Return tokens/s by name of a group of requests, given the plan of each. Groups take turns; the best run counts."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    best, answers = dict.fromkeys(requests, float("inf")), {}
    for turn in range(repeats + 1):  # the first turn loads the adapters
        for name, plans in requests.items():
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts(len(plans))]
            begin = clock()
            outputs = engine.generate(inputs, greedy, lora_request=plans, use_tqdm=False)
            if turn:
                best[name] = min(best[name], clock() - begin)
            answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
            assert all(len(tokens) == NEW for tokens in answers[name])
    for name, plans in requests.items():  # vLLM silently ignores adapters of modules that it does not know
        changed = sum(one != other for one, other in zip(answers[name], answers[UNSTEERED], strict=True))
        assert (changed > len(plans) / 2) == any(plans), f"{name}: {changed} of {len(plans)} answers are changed"
    return {name: len(plans) * NEW / best[name] for name, plans in requests.items()}


def run_engine(path: Path, args, at_once: int, *groups: dict[str, list], **lora) -> list[dict[str, float]]:
    """Return the tokens/s of every set of groups in one engine. Engines share global state, so only one runs at a time."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        str(path), dtype=args.dtype, skip_tokenizer_init=True, max_model_len=PROMPT + NEW + 1, max_num_seqs=at_once,
        enable_prefix_caching=False, trust_remote_code=False, **lora,
    )  # fmt: skip
    speeds = [tokens_per_second(engine, requests, args.repeats) for requests in groups]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return speeds


def prompts(count: int) -> list[list[int]]:
    return torch.randint(3, VOCABULARY, (count, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()


def measure(path: Path, adapters: list, args) -> dict[str, float]:
    from vllm.lora.request import LoRARequest

    plans = [LoRARequest(str(i), i + 1, str(adapter.folder)) for i, adapter in enumerate(adapters)]
    lora = {
        "enable_lora": True,
        "max_cpu_loras": MANY,
        "lora_target_modules": adapters[0].targets,
        "max_lora_rank": max_lora_rank(max(adapter.rank for adapter in adapters)),
    }
    few = {UNSTEERED: [], "unsteered again": []} | {f"{count} plans": plans[:count] for count in DISTINCT}
    few = {name: requests_under(group, REQUESTS) for name, group in few.items()}
    many = {UNSTEERED: requests_under([], MANY), "plans": requests_under(plans, MANY)}
    [off] = run_engine(path, args, REQUESTS, {UNSTEERED: few[UNSTEERED]})
    speed, over = run_engine(path, args, REQUESTS, few, many, max_loras=REQUESTS, **lora)
    [at_once] = run_engine(path, args, MANY, many, max_loras=MANY, **lora)
    unsteered = speed.pop(UNSTEERED)
    return {
        "unsteered, tokens/s": unsteered,
        "lora off / unsteered": off[UNSTEERED] / unsteered,
        **{f"{name} / unsteered": value / unsteered for name, value in speed.items()},
        f"{MANY} plans over {REQUESTS} slots / unsteered": over["plans"] / over[UNSTEERED],
        f"{MANY} plans at once / unsteered": at_once["plans"] / at_once[UNSTEERED],
        f"{MANY} requests at once, unsteered, tokens/s": at_once[UNSTEERED],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "model", build()
        model.save_pretrained(path)
        adapters = [save_lora(path, plan, Path(folder) / str(i)) for i, plan in enumerate(plans(model, MANY))]
        del model
        result = measure(path, adapters, args)
    rank = max(adapter.rank for adapter in adapters)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    result |= {
        "largest rank": rank, "max_lora_rank": max_lora_rank(rank), "dtype": args.dtype, "threads": torch.get_num_threads(),
        "vllm": vllm.__version__, "torch": torch.__version__, "machine": device,
    }  # fmt: skip
    show(result)
    keep(result, args.out)


if __name__ == "__main__":
    main()
