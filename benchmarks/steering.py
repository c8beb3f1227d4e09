"""Measure what steering costs, as ratios from one run on this machine; write a table, a picture and JSON figures.

    bash benchmarks/peers.sh                            # once, for the comparison with two other libraries
    python benchmarks/steering.py [--out FILE.json] [--picture FILE.png]

A random Llama (hidden 512, 8 layers, as in core.py), one thread, CPU time. Decoding: ways to steer the same 100 AUs take
turns, token by token, with upstream's unpatched model on the same weights; "folded checkpoint" is one that
austeer/export/fold.py wrote and upstream's transformers loaded. Growth: screening with the number of layers, width and pairs; live
steering with k. Matrix products: those of screening alone, in the same shapes, as a share of its time. Memory: the peak of
a process that decodes. Peers: benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from core import PAIRS, VOCABULARY, _status, build, build_upstream, memory, pairs, screen_ours
from decoding import against_first, cpu_seconds, hook, on_weights_of, shared, sparse_plan
from figures import keep
from peft import PeftModel
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig

import rmodels
from austeer.errors import run_command
from austeer.export.fold import fold
from austeer.export.hot_patch import folded
from austeer.export.lora import save_lora
from austeer.steering import apply

ROOT = Path(__file__).parents[1]
FOLDED = "folded checkpoint"
PATCHES = contextlib.ExitStack()  # holds what stays patched until the end
PEERS = ROOT / ".venv-peers" / "bin" / "python"
BATCHES, GROWING_K = (1, 8, 32), (1, 10, 100, 1000)
TURNS = {1: 100, 8: 80, 32: 40}
LAYERS, WIDTHS, PAIR_NUMBERS = (2, 4, 8), (256, 512, 1024), (32, 64, 128)


def way(name: str, model, folder: Path):
    """Return the model steered in one way by 100 AUs on the same weights, at the ffn site unless the name says attention."""
    site = "attention" if "attention" in name else "ffn"
    plan = sparse_plan(site, rmodels.site_shape(model, site))
    if name in ("idle", "hot patch") or name.startswith("live"):
        steered = shared(model, but="down_proj" if name == "hot patch" else None)
        if name == "hot patch":
            PATCHES.enter_context(folded(steered, plan))
        elif name != "idle":
            apply(steered, plan)
        return steered
    if name == FOLDED:
        model.save_pretrained(folder / "original")
        # without a certificate, which needs a tokenizer: `check_agreement` compares logits
        fold(folder / "original", plan, folder / "folded", certificate=False)
        return loaded(folder)
    upstream = build_upstream(model)
    upstream.load_state_dict(model.state_dict(), assign=True)
    if name == "forward hooks":
        return hook(upstream, plan)
    if name == "LoRA by PEFT":
        if not (folder / "lora").exists():
            save_lora(model, plan, folder / "lora")
        return PeftModel.from_pretrained(upstream, folder / "lora").eval()
    return upstream


def loaded(folder: Path):
    """Load the folded checkpoint by upstream's class."""
    model = AutoModelForCausalLM.from_pretrained(folder / "folded", trust_remote_code=False)
    # copy weights out of the mapped file: only the pages that were read would count as memory
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    return model.eval().requires_grad_(False)


WAYS = (
    "upstream",
    "upstream again",
    "idle",
    FOLDED,
    "hot patch",
    "live, ffn",
    "live, attention",
    "forward hooks",
    "LoRA by PEFT",
)


def decoding(model, folder: Path) -> dict[int, dict]:
    ways = {name: way(name, model, folder) for name in WAYS}
    check_agreement(ways)
    on_weights_of(model, ways[FOLDED])
    return {
        batch: {name: asdict(one) for name, one in against_first(ways, batch, TURNS[batch]).items()}
        for batch in BATCHES
    }


@torch.inference_mode()
def check_agreement(ways: dict) -> None:
    """Check that ways to steer by the same plan give the same logits, and that none is a silent no-op."""
    vocabulary = ways["upstream"].config.vocab_size
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(5))
    logits = {name: way(input_ids=ids).logits for name, way in ways.items()}
    for name in (FOLDED, "hot patch", "forward hooks", "LoRA by PEFT"):
        assert (logits[name] - logits["live, ffn"]).abs().max() < 1e-4, name
    assert torch.equal(logits["upstream"], logits["idle"])
    assert all((logits["upstream"] - logits[f"live, {site}"]).abs().max() > 1e-3 for site in ("ffn", "attention"))


def growing_k(model) -> dict[int, dict]:
    """Time live steering at the attention site with growing k, at batch 8."""
    ways = {"upstream": way("upstream", model, ROOT)}
    for k in GROWING_K:
        ways[str(k)] = shared(model)
        apply(ways[str(k)], sparse_plan("attention", (8, 512), k))
    return {int(k): asdict(one) for k, one in against_first(ways, 8, TURNS[8]).items() if k != "upstream"}


def llama(layers: int, width: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=1024,
        attn_implementation="sdpa",
    )  # fmt: skip
    return rmodels.family("llama")(config).eval().requires_grad_(False)


def growth() -> dict[str, dict[int, float]]:
    """Return CPU seconds of screening 32 pairs on 4 layers of width 512, with one of these three numbers varied."""
    works = {}
    for name, cases in (
        ("layers", [(n, llama(n, 512), 32) for n in LAYERS]),
        ("width", [(n, llama(4, n), 32) for n in WIDTHS]),
        ("pairs", [(n, llama(4, 512), n) for n in PAIR_NUMBERS]),
    ):
        for size, model, count in cases:
            works[name, size] = partial(screen_ours, model, pairs(count), "activation")
    seconds = cpu_seconds(works)
    return {
        name: {size: s for (one, size), s in seconds.items() if one == name} for name in ("layers", "width", "pairs")
    }


@torch.inference_mode()
def matrix_products(count: int = 8) -> dict[str, dict[str, float]]:
    """Time screening at hidden 1024, and the products of its linear layers alone, in the same shapes and order."""
    model, data, result = llama(8, 1024), pairs(count), {}
    for name, size in (("default batches", None), ("8 pairs at once", 8)):
        screening = partial(screen_ours, model, data, "activation", size)
        calls = linear_calls(model, screening)
        inputs = {shape: torch.ones(shape) for shape, _ in calls}
        works = {"screening": screening, "products": partial(multiply, calls, inputs)}
        seconds = cpu_seconds(works, repeats=3)
        operations = sum(2 * shape.numel() * len(weight) for shape, weight in calls)
        result[name] = {
            "share": seconds["products"] / seconds["screening"],
            "screening, GFLOP/s": operations / seconds["screening"] / 1e9,
            "products alone, GFLOP/s": operations / seconds["products"] / 1e9,
        }
    return result


def linear_calls(model, work) -> list[tuple[torch.Size, torch.Tensor]]:
    """Return the input shape and the weight of every linear layer that the work runs, in order."""
    calls = []
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: calls.append((args[0].shape, layer.weight)))
        for layer in layers
    ]
    work()
    for one in hooks:
        one.remove()
    return calls


def multiply(calls, inputs) -> None:
    for shape, weight in calls:
        linear(inputs[shape], weight)


def peak(name: str, folder: Path) -> float:
    """Return the peak MB of a process that decodes 16 tokens at batch 8 in this way, without its libraries (Linux).

    The folded checkpoint is in the folder already, so that folding it does not count.
    """
    command = [sys.executable, __file__, "--peak", name, folder]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, folder: Path) -> None:
    before = _status("VmRSS")
    steered = loaded(folder) if name == FOLDED else way(name, build(), folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    against_first({name: steered}, 8, 16)
    print((_status("VmHWM") - before) / 1024)


def peers() -> dict | str:
    if not PEERS.exists():
        return "not measured: bash benchmarks/peers.sh installs them"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        subprocess.run([PEERS, ROOT / "benchmarks" / "peers.py", "--out", out], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def measure(folder: Path) -> dict:
    model = build()
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
        "decoding": decoding(model, folder),
        "growing k, batch 8": growing_k(model),
        "screening, s": growth(),
        "matrix products at hidden 1024": matrix_products(),
        "screening, MB above the model": {count: memory(count) for count in (PAIRS // 4, PAIRS)},
        "decoding, peak MB": {name: peak(name, folder) for name in WAYS},
        "peers": peers(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--picture", type=Path, help="also draw the picture to this file")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        with PATCHES:
            print_peak(args.peak[0], Path(args.peak[1]))
        return
    from steering_report import draw, table

    with PATCHES, tempfile.TemporaryDirectory() as folder:
        # as in the file, where keys that are numbers become strings
        figures = json.loads(json.dumps(measure(Path(folder))))
    print(table(figures))
    keep(figures, args.out)
    if args.picture:
        draw(figures, args.picture)


if __name__ == "__main__":
    run_command(main)
