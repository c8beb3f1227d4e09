"""Compare this project with `repeng` and `steering-vectors`: the same model, pairs and plan, in one process.

    bash benchmarks/peers.sh && .venv-peers/bin/python benchmarks/peers.py [--out FILE.json]

Their plans add one vector per layer, which is a plan with shifts at site "layer" here, so that is compared. Both also accept
a function of activation and vector, so steering-vectors can scale the output of MLP blocks (site "ffn"), and repeng that of
layers. Neither reaches the input of `o_proj` or `down_proj`, steers rows of a batch by plans of their own, or writes what it
does into weights or adapters. Logits are compared before anything is timed.

"screening" is their training of a vector, from the hidden states of both texts of a pair at the last token, against our
ranking of the same site.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import asdict
from pathlib import Path

import steering_vectors
import torch
from core import VOCABULARY, build, build_upstream, pairs
from decoding import against_first, cpu_seconds, hook, shared, sparse_plan
from figures import keep
from repeng import ControlModel, ControlVector, DatasetEntry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from austeer.plan import Plan
from austeer.steering import apply
from MFU_screening import screen

BATCHES, PAIRS = (1, 8, 32), 16
TURNS = {1: 80, 8: 60, 32: 30}


def ways_to_add(model, plan: Plan) -> dict:
    """Return the ways to add a vector, each with modules of its own, since some take the model apart."""
    shift = plan.shifts["layer"]
    upstream = build_upstream(model)
    upstream.load_state_dict(model.state_dict(), assign=True)
    controlled = ControlModel(shared(upstream), range(len(shift)))
    controlled.set_control(ControlVector("llama", {layer: row.numpy() for layer, row in enumerate(shift)}))
    patched = shared(upstream)
    steering_vectors.SteeringVector(dict(enumerate(shift))).patch_activations(patched)
    apply(model, plan)
    return {
        "upstream": upstream, "forward hooks": hook(shared(upstream), plan), "ours, live": model, "repeng": controlled,
        "steering-vectors": patched,
    }  # fmt: skip


def ways_to_scale(model, plan: Plan) -> dict:
    """Return the ways to scale AUs at the ffn site, which repeng does not reach."""
    upstream = build_upstream(model)
    upstream.load_state_dict(model.state_dict(), assign=True)
    patched = shared(upstream)
    vector = steering_vectors.SteeringVector(dict(enumerate(plan.scales["ffn"])), "mlp")
    vector.patch_activations(patched, operator=lambda x, scale: x * scale)
    apply(model, plan)
    return {"upstream": upstream, "ours, live": model, "steering-vectors": patched}


@torch.inference_mode()
def check_logits(ways: dict) -> float:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    logits = {
        name: way(input_ids=ids, position_ids=torch.arange(24).expand(2, -1)).logits for name, way in ways.items()
    }
    apart = max(float((one - logits["ours, live"]).abs().max()) for name, one in logits.items() if name != "upstream")
    moved = float((logits["upstream"] - logits["ours, live"]).abs().max())
    assert apart < 1e-4 < moved / 10, (apart, moved)
    return apart


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word per token id, which turns the pairs of core.py into texts, the same for all."""
    core = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0", eos_token="2", padding_side="left")


def screening(model) -> dict[str, float]:
    """Return pairs per second."""
    tokenizer, upstream = words(), build_upstream(model)
    texts = [tuple(" ".join(map(str, ids)) for ids in (p.prefix, p.positive, p.negative)) for p in pairs(PAIRS)]
    rows = [[prompt, " " + right, " " + wrong] for prompt, right, wrong in texts]
    both = [(prompt + right, prompt + wrong) for prompt, right, wrong in rows]
    entries = [DatasetEntry(*two) for two in both]

    def repeng(size: int):
        with contextlib.redirect_stderr(io.StringIO()):
            ControlVector.train(upstream, tokenizer, entries, batch_size=size)

    works = {
        "ours, default": lambda: screen(rows, model, tokenizer, ["layer"], progress=False),
        "ours, 8 pairs at once": lambda: screen(rows, model, tokenizer, ["layer"], batch_size=8, progress=False),
        "repeng, 32 texts at once (default)": lambda: repeng(32),
        "repeng, 8 texts at once": lambda: repeng(8),
        "steering-vectors, 1 (default)": lambda: steering_vectors.train_steering_vector(upstream, tokenizer, both),
        "steering-vectors, 8 at once": lambda: steering_vectors.train_steering_vector(
            upstream, tokenizer, both, batch_size=8
        ),
    }
    return {name: PAIRS / seconds for name, seconds in cpu_seconds(works).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build()
    generator = torch.Generator().manual_seed(4)
    added = Plan({}, {"layer": 0.05 * torch.randn(8, 512, generator=generator)})
    result = {"screening, pairs/s": screening(model)}
    for name, ways in (
        ("a vector added to every layer", ways_to_add(build(), added)),
        ("100 AUs scaled, ffn", ways_to_scale(build(), sparse_plan("ffn", (8, 512)))),
    ):
        check_logits(ways)
        result[name] = {}
        for batch in BATCHES:
            ratios = against_first(ways, batch, TURNS[batch])
            result[name][batch] = {way: asdict(ratio) for way, ratio in ratios.items()}
    print(json.dumps(result, indent=1))
    keep(result, args.out)


if __name__ == "__main__":
    main()
