"""Speed at the true shapes of large models, with random bfloat16 weights on one GPU, beside the hardware's limit.

    python benchmarks/gpu.py --shape llama2-7b [--out benchmarks/results/gpu-llama2-7b.json]
    python benchmarks/gpu.py --shape tiny --device cpu          # the same code on any machine

The floor of a figure is the larger of two times: its bytes over the bandwidth, and its FLOPs over the matmul rate, both
measured in the same run. Decoding is timed in blocks, each beside one of upstream's; "compiled" is torch.compile on a
static cache, with CUDA graphs on a GPU. `graphs skipped` counts the graphs that could not be captured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from answering import Tokens, prompts
from core import pairs, screen_ours
from decoding import sparse_plan
from figures import keep
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import rmodels
from austeer.errors import AUSteerError, run_command
from austeer.export.hot_patch import folded
from austeer.steering import steer
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer

SHAPES = {  # as in the models' own config.json
    "tiny": dict(
        model_type="llama", vocab_size=32000, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    ),
    "tiny-moe": dict(
        model_type="qwen3_moe", vocab_size=32000, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
        moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    ),
    "llama2-7b": dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    ),
    "gemma2-9b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, max_position_embeddings=8192, sliding_window=4096,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
BATCHES, PROMPT, STEPS, ROUNDS = (1, 32), 128, 64, 5
N_PROMPTS, N_PAIRS = 256, 256
BYTES = 2  # size of a bfloat16 number


class Machine:
    """Measure bandwidth and matmul rate, time work on the device, and compute floors from the two rates."""

    def __init__(self, device: str):
        self.device = device
        self.name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
        big = 2**30 if self.cuda else 2**26
        source, target = (torch.ones(big, dtype=torch.uint8, device=device) for _ in range(2))
        self.bandwidth = 2 * big / self.best(lambda: target.copy_(source))
        size = 8192 if self.cuda else 512
        a, b = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.matmul_rate = 2 * size**3 / self.best(lambda: a @ b)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def seconds(self, work) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def best(self, work, repeats: int = 5) -> float:
        work()
        return min(self.seconds(work) for _ in range(repeats))

    def floor(self, bytes_read: float, flops: float) -> float:
        return max(bytes_read / self.bandwidth, flops / self.matmul_rate)

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Work:
    """Count the bytes and FLOPs that any way of computing needs."""

    def __init__(self, model):
        config = self.config = model.config
        self.head = model.lm_head.weight.numel()
        experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
        self.dense = sum(weight.numel() for weight in model.model.layers.parameters()) - experts
        self.experts = experts
        self.share = config.num_experts_per_tok / config.num_experts if experts else 0.0
        heads, width = config.num_attention_heads, config.head_dim
        self.attention = 4 * config.num_hidden_layers * heads * width  # FLOPs per query and key
        self.cached = 2 * config.num_hidden_layers * config.num_key_value_heads * width * BYTES  # bytes per token

    def decode(self, batch: int, context: float) -> tuple[float, float]:
        """Return the bytes and FLOPs of one token of every row."""
        share = 1 - (1 - self.share) ** batch  # of the experts that some row uses, if all are equally likely
        read = BYTES * (self.dense + self.head + share * self.experts) + batch * context * self.cached
        return read, batch * (2 * (self.dense + self.head + self.share * self.experts) + context * self.attention)

    def prefill(self, lengths: list[int], heads: int) -> tuple[float, float]:
        """Return the bytes and FLOPs of prompts, `heads` of whose tokens get logits; the weights are read once."""
        read = BYTES * (self.dense + self.experts + (self.head if heads else 0))
        flops = sum(2 * (self.dense + self.share * self.experts) * n + self.attention * n * n / 2 for n in lengths)
        return read, flops + 2 * heads * self.head


def build(shape: str, device: str):
    """Return upstream's model with random weights, and ours, which shares its tensors."""
    config = AutoConfig.for_model(**SHAPES[shape])
    kernel = rmodels.family(config.model_type).DEFAULT_KERNEL or "sdpa"
    config._attn_implementation = kernel
    torch.manual_seed(0)
    with torch.device(device):
        upstream = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=kernel, trust_remote_code=False
        )
    with torch.device("meta"):
        ours = rmodels.family(config.model_type)(AutoConfig.for_model(**SHAPES[shape], attn_implementation=kernel))
    ours.load_state_dict(upstream.state_dict(), assign=True)
    for name, buffer in upstream.named_buffers():  # such as rotary frequencies, which no state dict holds
        owner, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, buffer)
    assert not any(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])
    rmodels.check_gates(ours)
    for model in (upstream, ours):
        model.eval().requires_grad_(False)
        model.generation_config.eos_token_id = None  # random weights: no answer ends by itself
    return upstream, ours


def decoding(machine: Machine, upstream, ours, batch: int, compiled: bool) -> dict:
    """Return milliseconds per token and their ratio to upstream's, in alternating blocks; upstream's own ratio is noise."""
    shapes = {site: rmodels.site_shape(ours, site) for site in ("attention", "ffn")}
    plans = {site: sparse_plan(site, shape) for site, shape in shapes.items()}
    ways = {
        "upstream": (upstream, contextlib.nullcontext),
        "idle": (ours, contextlib.nullcontext),
        **{f"live, {site}": (ours, lambda plan=plan: steer(ours, plan)) for site, plan in plans.items()},
        "hot patch": (ours, lambda: folded(ours, plans["ffn"])),
    }
    ids = torch.randint(3, 32000, (batch, PROMPT + STEPS), generator=torch.Generator().manual_seed(2)).to(
        machine.device
    )
    run = {model: Decoder(model, compiled, machine.cuda) for model in (upstream, ours)}
    result = {}
    for name, (model, steering) in ways.items():
        seconds = []
        counters.clear()
        with steering():  # set once, since compiled code is specialised on what is set
            for _ in range(ROUNDS + 1):
                seconds.append([run[one].seconds(machine, ids) / STEPS for one in (upstream, model)])
        base, own = zip(*seconds[1:], strict=True)  # the first compiles
        ratio = statistics.median(b / a for a, b in seconds[1:])
        result[name] = {
            "ms": 1000 * statistics.median(own),
            "upstream ms": 1000 * statistics.median(base),
            "ratio": ratio,
            "graphs skipped": counters["inductor"]["cudagraph_skips"],
        }
    floor = machine.floor(*Work(ours).decode(batch, PROMPT + STEPS / 2))
    return {**result, "floor ms": 1000 * floor}


class Decoder:
    """Decode token by token: eagerly on a growing cache, or compiled on a static one."""

    def __init__(self, model, compiled: bool, cuda: bool):
        self.model, self.cache, self.step = model, None, model
        if compiled:
            self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
            self.step = torch.compile(
                model.forward, mode="reduce-overhead" if cuda else None, dynamic=False, fullgraph=True
            )
        self.compiled = compiled

    @torch.no_grad()
    def seconds(self, machine: Machine, ids) -> float:
        """Return the seconds of all tokens after the prompt."""
        if self.compiled:
            self.cache.reset()
        else:
            self.cache = DynamicCache(config=self.model.config)
        self.model(ids[:, :PROMPT], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return machine.seconds(lambda: self._continue(ids[:, PROMPT:]))

    def _continue(self, ids) -> None:
        for column in ids.split(1, 1):
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            self.step(column.contiguous(), past_key_values=self.cache, use_cache=True)


def measure(shape: str, device: str, n_prompts: int, n_pairs: int) -> dict:
    machine = Machine(device)
    upstream, ours = build(shape, device)
    work = Work(ours)
    result = {
        "shape": shape, "config": SHAPES[shape], "device": machine.name, "torch": torch.__version__,
        "transformers": transformers.__version__, "parameters, 1e9": sum(w.numel() for w in ours.parameters()) / 1e9,
        "bandwidth, GB/s": machine.bandwidth / 1e9, "matmul, TFLOP/s": machine.matmul_rate / 1e12,
    }  # fmt: skip
    data = pairs(n_pairs)
    seconds = machine.best(lambda: screen_ours(ours, data, "activation"), 2)
    floor = machine.floor(*work.prefill([pair.cost for pair in data], 0))
    result["screening"] = {"pairs/s": n_pairs / seconds, "floor / time": floor / seconds, "peak GB": machine.peak_gb()}
    texts = prompts(n_prompts, 0)
    seconds = machine.best(lambda: LiveAnswerer(ours, Tokens()).answer(texts, Generation(1)), 2)
    floor = machine.floor(*work.prefill([len(text) for text in texts], n_prompts))
    result["one-token answers"] = {"prompts/s": n_prompts / seconds, "floor / time": floor / seconds}
    for batch in BATCHES:
        for compiled in (False, True):
            name = f"decoding, batch {batch}, {'compiled' if compiled else 'eager'}"
            try:
                result[name] = decoding(machine, upstream, ours, batch, compiled)
            except Exception as error:  # the compiler raises many kinds; the other figures stand
                result[name] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            print(name, json.dumps(result[name]), flush=True)
            torch.compiler.reset()
            gc.collect()
    result["peak GB"] = machine.peak_gb()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--n-prompts", type=int, default=N_PROMPTS, help="prompts to answer (default: %(default)s)")
    parser.add_argument("--n-pairs", type=int, default=N_PAIRS, help="pairs to screen (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    args = parser.parse_args()
    if args.out and not args.out.parent.is_dir():
        raise AUSteerError(f"there is no folder {args.out.parent}: create it first")
    figures = measure(args.shape, rmodels.check_device(args.device), args.n_prompts, args.n_pairs)
    print(json.dumps(figures, indent=1))
    keep(figures, args.out)


if __name__ == "__main__":
    run_command(main)
