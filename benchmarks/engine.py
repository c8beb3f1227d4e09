"""Throughput of vLLM with many plans at once, as ratios to the unsteered model of the same run.

    .venv-vllm/bin/python benchmarks/engine.py [--dtype float32] [--repeats 2] [--out FILE.json]

A random Llama (hidden 512, 8 layers, as in core.py); 64 requests of 32 prompt and 32 new tokens, all at once, under 0,
1, 16 or 64 distinct plans of 25 AUs at the attention site (as dense as 100 over 32 layers). "lora off" is the same
model in an engine that was started without adapters: what a server that never steers would give. On a CPU, seconds are
of CPU time on one thread, which others on the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

import torch
from core import VOCABULARY, build

import rmodels
from export.lora import max_lora_rank, save_lora
from plan import Plan

REQUESTS, PROMPT, NEW, UNITS = 64, 32, 32, 25
DISTINCT = (1, 16, 64)


def plans(model, count: int) -> list[Plan]:
    shape, made = rmodels.site_shape(model, "attention"), []
    for seed in range(count):
        scales = torch.zeros(shape)
        chosen = torch.randperm(scales.numel(), generator=torch.Generator().manual_seed(seed))[:UNITS]
        scales.view(-1)[chosen] = 1.0
        made.append(Plan({"attention": scales}))
    return made


def start(path: Path, args, **lora):
    from vllm import LLM

    return LLM(
        str(path), dtype=args.dtype, skip_tokenizer_init=True, max_model_len=PROMPT + NEW + 1, max_num_seqs=REQUESTS,
        enable_prefix_caching=False, trust_remote_code=False, **lora,
    )  # fmt: skip


def tokens_per_second(engine, settings: dict[str, list | None], repeats: int) -> dict[str, float]:
    """By name of a setting, a list of adapters. They take turns, and the best of each counts."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (REQUESTS, PROMPT), generator=generator).tolist()
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    best = dict.fromkeys(settings, float("inf"))
    for turn in range(repeats + 1):  # in the first, adapters are loaded
        for name, adapters in settings.items():
            begin = clock()
            outputs = engine.generate(asked, greedy, lora_request=adapters, use_tqdm=False)
            if turn:
                best[name] = min(best[name], clock() - begin)
            assert all(len(output.outputs[0].token_ids) == NEW for output in outputs)
    return {name: REQUESTS * NEW / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "model", build()
        model.save_pretrained(path)
        adapters = [save_lora(path, plan, Path(folder) / str(i)) for i, plan in enumerate(plans(model, max(DISTINCT)))]
        rank = max(adapter.rank for adapter in adapters)
        del model

        engine = start(path, args)
        off = tokens_per_second(engine, {"off": None}, args.repeats)["off"]
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()

        engine = start(
            path, args, enable_lora=True, max_loras=max(DISTINCT), max_lora_rank=max_lora_rank(rank),
            lora_target_modules=adapters[0].targets,
        )  # fmt: skip
        requests = [LoRARequest(str(i), i + 1, str(adapter.folder)) for i, adapter in enumerate(adapters)]
        settings = {"unsteered": None, "unsteered again": None}
        settings |= {f"{count} plans": [requests[i % count] for i in range(REQUESTS)] for count in DISTINCT}
        speed = tokens_per_second(engine, settings, args.repeats)
    unsteered = speed.pop("unsteered")
    result = {"unsteered, tokens/s": unsteered, "lora off / unsteered": off / unsteered}
    result |= {f"{name} / unsteered": value / unsteered for name, value in speed.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    result |= {
        "largest rank": rank, "max_lora_rank": max_lora_rank(rank), "dtype": args.dtype, "threads": torch.get_num_threads(),
        "vllm": vllm.__version__, "torch": torch.__version__, "machine": device,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:<30} {value:.3f}" if isinstance(value, float) else f"{name:<30} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
