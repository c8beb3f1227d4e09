"""Real language models: live, folded and LoRA steering agree on them as on tiny random ones.

SmolLM2-135M is a test dependency (tests/run.sh fetches it). Of the others the environment names the folders.
"""

import os

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rmodels
from austeer.export.hot_patch import folded
from austeer.export.lora import save_lora
from austeer.pairs import Pair
from MFU_screening import screen
from set_MFU import set_MFU, steer

SITES = ("attention", "ffn")
TOLERANCE = 1e-4  # of logits in float32, the largest of which are about 20
PROMPTS = ("The capital of France is", "Question: is a stone soft?\nAnswer:")
NEW_TOKENS = 20

THINGS = {
    "heavy": ["iron", "a stone", "a truck", "an anchor", "a piano", "lead", "a whale", "an anvil"],
    "light": ["a feather", "a leaf", "dust", "a balloon", "paper", "a petal", "foam", "a hair"],
    "hot": ["fire", "lava", "the sun", "steam", "an oven", "a candle flame", "boiling water", "a furnace"],
    "cold": ["ice", "snow", "a glacier", "the Arctic", "frost", "a freezer", "winter", "sleet"],
}
OPPOSITE = {"heavy": "light", "light": "heavy", "hot": "cold", "cold": "hot"}
PAIRS = [
    (f"Question: is {thing} {word}?\nAnswer:", *((" yes", " no") if word == kind else (" no", " yes")))
    for kind, things in THINGS.items()
    for thing in things
    for word in (kind, OPPOSITE[kind])
]


def by_environment(name: str):
    missing = pytest.mark.skipif(name not in os.environ, reason=f"{name} names no folder")
    return pytest.param(name, marks=[pytest.mark.slow, missing], id=name.removeprefix("AUSTEER_").lower())


@pytest.fixture(
    scope="module",
    params=["smollm2", by_environment("AUSTEER_GEMMA3_270M"), by_environment("AUSTEER_QWEN25_CODER_05B")],
)
def real(request):
    """Return a model in float32, its tokenizer, its folder, and a plan per site made from 64 pairs."""
    folder = request.getfixturevalue("smollm2") if request.param == "smollm2" else os.environ[request.param]
    model = rmodels.load(folder, dtype="float32", device="cpu")
    tokenizer = rmodels.load_tokenizer(folder)
    pairs = [Pair(*pair) for pair in PAIRS]
    ranks = screen(pairs, model, tokenizer, SITES, momentum="causal")
    return model, tokenizer, folder, [set_MFU(ranks[site], k=16, alpha=2.0) for site in SITES]


@torch.no_grad()
def logits(model, tokenizer):
    return [model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in PROMPTS]


def answer(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    return model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS).tolist()


def apart(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_it_speaks(real):
    model, tokenizer, *_ = real
    # Gemma-3-270M, a base model of four bits, says "the capital of the country of France"
    prompt, goes_on = (
        ("Monday, Tuesday, Wednesday,", " Thursday") if "gemma" in model.config.model_type else (PROMPTS[0], " Paris")
    )
    ids = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=5)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(answer).startswith(goes_on)


def test_live_folded_and_lora_agree(real, tmp_path):
    model, tokenizer, folder, plans = real
    assert len(PAIRS) == 64 and len(set(PAIRS)) == 64
    unsteered = logits(model, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert apart(logits(base, tokenizer), unsteered) == 0
    for site, plan in zip(SITES, plans, strict=True):
        assert len(plan) == 16
        with steer(model, plan):
            live, said = logits(model, tokenizer), answer(model, tokenizer)
        assert apart(live, unsteered) > 100 * TOLERANCE, f"{site}: the plan does too little to prove anything"
        with folded(model, plan):
            assert apart(logits(model, tokenizer), live) < TOLERANCE
            assert answer(model, tokenizer) == said
        save_lora(model, plan, tmp_path / site)
        adapted = PeftModel.from_pretrained(base, tmp_path / site)
        assert apart(logits(adapted, tokenizer), live) < TOLERANCE
        assert answer(adapted, tokenizer) == said
        base = adapted.unload()
    assert apart(logits(model, tokenizer), unsteered) == 0
