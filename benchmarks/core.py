"""Speed of screening and of live steering, as ratios from one run on this machine.

    python benchmarks/core.py [--threads 1] [--repeats 5] [--out FILE.json]

The model is a random Llama (hidden 512, 8 layers, inter 1376), with 64 pairs of about 146 tokens and short answers.
"plain" does what a straightforward script does: one full text per forward, batch 1, all hidden states, the LM head,
and every activation kept. "floor" runs the matrix products of the plain way alone, in the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from figures import keep
from transformers import LlamaConfig

import rmodels
from austeer.batching import TOKENS_AT_ONCE, pair_batches
from austeer.plan import Plan
from austeer.steering import steer
from austeer.tokens import CLEAN, EncodedPair
from MFU_screening import MOMENTA

PAIRS, PROMPT, VOCABULARY = 64, 144, 32000


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    return rmodels.family("llama")(config).eval().requires_grad_(False)


def pairs(count: int) -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length = PROMPT + int(torch.randint(-8, 9, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length + 4,), generator=generator).tolist()
        rows.append(EncodedPair(tuple(ids[:length]), tuple(ids[length : length + 2]), tuple(ids[length + 2 :])))
    return rows


@torch.inference_mode()
def screen_plain(model, data) -> None:
    activations = {gate.layer: [] for gate in rmodels.gates(model, "ffn")}
    hooks = [
        gate.register_forward_hook(lambda gate, args, out: activations[gate.layer].append(out[0, -1].clone()))
        for gate in rmodels.gates(model, "ffn")
    ]
    for pair in data:
        for tail in (pair.positive, pair.negative):
            model(torch.tensor([pair.prefix + tail]), output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    x = torch.stack([torch.stack(rows) for rows in activations.values()]).unflatten(1, (-1, 2))
    momentum = x[:, :, 0] - x[:, :, 1]
    (momentum > 0).sum(1), (momentum < 0).sum(1)


def screen_ours(model, data, momentum: str, size: int | None = None) -> None:
    total = MOMENTA[momentum](model, ["ffn"], CLEAN)
    for batch in pair_batches(data, size, TOKENS_AT_ONCE["cpu"]):
        total.add(batch)


@torch.inference_mode()
def matmul_floor(model, data) -> None:
    """Run only the matrix products of the plain way: every Linear on every full text."""
    shapes = {}
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            shapes.setdefault(tuple(module.weight.shape), []).append(module.weight)
    for pair in data:
        for tail in (pair.positive, pair.negative):
            tokens = len(pair.prefix) + len(tail)
            for (_, inputs), weights in shapes.items():
                x = torch.ones(tokens, inputs)
                for weight in weights:
                    torch.mm(x, weight.T)


def median_seconds(repeats: int, *works) -> list[float]:
    """Return the median seconds of each work, interleaved so that all meet the same load."""
    times = [[] for _ in works]
    for work in works:
        work()
    for _ in range(repeats):
        for times_of_work, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            times_of_work.append(time.perf_counter() - start)
    return [statistics.median(times_of_work) for times_of_work in times]


@torch.inference_mode()
def time_per_token(base, other, tokens: int) -> float:
    """Return CPU time per token, other / base, decoding in turn, so that other load on the machine cancels."""
    prompt = torch.randint(3, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(2))
    out = {model: model(prompt, use_cache=True) for model in (base, other)}
    times = {base: [], other: []}
    for turn in range(tokens):
        for model in (base, other) if turn % 2 else (other, base):
            token = out[model].logits[:, -1].argmax(-1, keepdim=True)
            start = time.process_time()
            out[model] = model(token, past_key_values=out[model].past_key_values, use_cache=True)
            times[model].append(time.process_time() - start)
    return statistics.median(b / a for a, b in zip(times[base], times[other], strict=True))


def memory(count: int) -> float:
    """Return the peak MB above the loaded model while a process of its own screens `count` pairs (Linux)."""
    process = subprocess.run(
        [sys.executable, __file__, "--memory", str(count)], capture_output=True, text=True, check=True
    )
    return float(process.stdout)


def print_memory(count: int) -> None:
    model, data = build(), pairs(count)
    screen_ours(model, data[:2], "activation", 1)  # fills one-time buffers of the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    screen_ours(model, data, "activation")
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print_memory(args.memory)
        return
    model, data = build(), pairs(PAIRS)
    figures = {"machine": platform.machine(), "torch": torch.__version__, "threads": args.threads}

    works = {
        "plain": lambda: screen_plain(model, data),
        "floor": lambda: matmul_floor(model, data),
        **{f"batch {b}": lambda b=b: screen_ours(model, data, "activation", b) for b in (1, 8)},
        "default": lambda: screen_ours(model, data, "activation"),
        "causal": lambda: screen_ours(model, data, "causal"),
    }
    seconds = dict(zip(works, median_seconds(args.repeats, *works.values()), strict=True))
    print(f"screening {PAIRS} pairs, {args.threads} thread(s)      pairs/s   against plain")
    for name, elapsed in seconds.items():
        figures[f"screening {name}"] = {"pairs_per_s": PAIRS / elapsed, "ratio": seconds["plain"] / elapsed}
        print(f"  {name:<34} {PAIRS / elapsed:>8.1f} {seconds['plain'] / elapsed:>14.2f}")

    scale = torch.zeros(8, 512)
    scale.view(-1)[torch.randperm(8 * 512, generator=torch.Generator().manual_seed(3))[:100]] = 0.01
    upstream = build_upstream(model)
    ratios = {"itself": time_per_token(upstream, build_upstream(model), 200)}
    ratios |= {"idle": time_per_token(upstream, model, 200)}
    for site in ("attention", "ffn"):
        with steer(model, Plan({site: scale})):
            ratios[f"live at k=100, {site}"] = time_per_token(upstream, model, 200)
    figures["time per token"] = ratios
    print("time per token against upstream: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))

    figures["memory_mb"] = {count: memory(count) for count in (64, 256)}
    print(
        "memory above the loaded model: "
        + ", ".join(f"{mb:.0f} MB at {n} pairs" for n, mb in figures["memory_mb"].items())
    )
    keep(figures, args.out)


def build_upstream(model):
    from transformers import LlamaForCausalLM

    config = LlamaConfig(**{**model.config.to_dict(), "attn_implementation": "sdpa"})
    upstream = LlamaForCausalLM(config).eval().requires_grad_(False)
    upstream.load_state_dict(model.state_dict())
    return upstream


if __name__ == "__main__":
    main()
