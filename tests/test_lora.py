"""The tempered loss and rank-1 LoRA: against plain loops on upstream's model; PEFT leaves nothing behind."""

import math
import random

import pytest
import torch
from conftest import PAIRS, save_tiny
from one_cell import computed
from reference import log_odds
from test_rival_methods import evidence_of, upstream_of
from transformers import AutoConfig

import rmodels
from austeer.change import Adapter, applied
from austeer.errors import AUSteerError
from austeer.identity import fingerprint
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.lora import LoRA, rank_one
from austeer.methods.training import TemperedLoss
from experiments.bench import BENCHES

IDS = torch.tensor([[1, 40, 77, 130]])
BALANCED = [(prompt, *((" yes", " no") if i % 3 else (" no", " yes"))) for i, (prompt, *_) in enumerate(PAIRS)]


def test_the_tempered_loss_is_that_of_a_plain_loop(llama, checkpoints, tokenizer):
    loss, upstream = TemperedLoss(evidence_of(llama, tokenizer, BALANCED)), upstream_of(checkpoints["llama"])
    b, tau, total = loss.temperature.answers, loss.temperature.tau, 0.0
    assert set(b) == {" yes", " no"} and abs(b[" yes"]) > 0.1
    for prompt, right, wrong in BALANCED:
        odds = log_odds(upstream, tokenizer, prompt, right, wrong)
        total += math.log1p(math.exp(-(odds - b[right] + b[wrong]) / tau))
    encoded = evidence_of(llama, tokenizer, BALANCED).encoded()
    assert sum(float(loss([pair])) for pair in encoded) == pytest.approx(total, rel=1e-4)
    assert float(loss(encoded)) == pytest.approx(total, rel=1e-4)


def test_a_pair_without_a_difference_does_not_shift_the_others(llama, tokenizer):
    """The pair is dropped together with its texts, so every other pair keeps its own answers."""
    same = ("Is it?", "<s>", "<s>")
    with_one = evidence_of(llama, tokenizer, [*BALANCED[:4], same, *BALANCED[4:]])
    assert TemperedLoss(with_one).temperature == TemperedLoss(evidence_of(llama, tokenizer, BALANCED)).temperature


def odds_with_terms(model, tokenizer, pair, terms):
    """Return the log-odds of a pair, differentiably, with y + b (a . x) at o_proj of every layer of upstream's model."""
    prompt, *answers = pair
    two = [tokenizer(prompt + answer)["input_ids"] for answer in answers]
    shared = next(i for i in range(99) if two[0][i] != two[1][i])
    hooks = []
    for layer, (a, b) in zip(model.model.layers, terms, strict=True):
        add = lambda module, args, y, a=a, b=b: y + (args[0] * a).sum(-1, keepdim=True) * b  # noqa: E731
        hooks.append(layer.self_attn.o_proj.register_forward_hook(add))
    total = []
    for ids in two:
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total.append(sum(logp[t - 1, ids[t]] for t in range(shared, len(ids))))
    for hook in hooks:
        hook.remove()
    return total[0] - total[1]


def test_training_is_that_of_a_plain_loop(llama, checkpoints, tokenizer):
    """Two epochs of two steps: AdamW with its decay of 0.01, written out, on one layer's terms at a time."""
    evidence = evidence_of(llama, tokenizer, PAIRS[:12])
    actual = LoRA(epochs=2).prepare(evidence)
    tau, upstream = TemperedLoss(evidence).temperature.tau, upstream_of(checkpoints["llama"])
    with rank_one(llama, list(actual.factors), 0) as start:
        terms = [[w.detach().double().flatten().clone().requires_grad_() for w in both] for both in start.values()]
    assert all(not b.any() and a.any() for a, b in terms)
    numbers = [w for both in terms for w in both]
    first, second = ([torch.zeros_like(w) for w in numbers] for _ in range(2))
    order, shuffle, step = list(range(12)), random.Random(0), 0
    for _ in range(2):
        shuffle.shuffle(order)
        for batch in (order[:8], order[8:]):
            step += 1
            odds = [odds_with_terms(upstream, tokenizer, PAIRS[j], terms) for j in batch]
            loss = sum(torch.log1p(torch.exp(-one / tau)) for one in odds) / len(batch)
            for i, gradient in enumerate(torch.autograd.grad(loss, numbers)):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                with torch.no_grad():
                    numbers[i] *= 1 - 1e-3 * 0.01
                    numbers[i] -= 1e-3 * first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-8)
    for (down, up), (a, b) in zip(actual.factors.values(), terms, strict=True):
        assert torch.allclose(down[0].double(), a, atol=1e-4) and torch.allclose(up[:, 0].double(), b, atol=1e-4)
        assert up.abs().max() > 2e-3, "it was trained"


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("site", ["attention", "neuron", "both"])
def test_the_model_is_left_as_it_was(name, site, checkpoints, tokenizer, tmp_path):
    if name == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=48, n_layer=2, n_head=4, vocab_size=320, n_positions=256)
        folder = save_tiny(tmp_path, config)
    else:
        folder = checkpoints[name]
    model = rmodels.load(folder, dtype="float32", device="cpu")
    modules, attributes = [id(module) for module in model.modules()], set(vars(model))
    before, mark = model(IDS).logits, fingerprint(model)
    evidence = evidence_of(model, tokenizer, PAIRS[:4], site)
    if name == "qwen3_moe" and site != "attention":
        with pytest.raises(AUSteerError, match="fused experts"):
            LoRA(epochs=1).prepare(evidence)
    else:
        adapter = LoRA(epochs=1).prepare(evidence)
        with applied(model, adapter.times(30)):
            assert not torch.equal(model(IDS).logits, before)
    assert [id(module) for module in model.modules()] == modules and set(vars(model)) == attributes
    assert torch.equal(model(IDS).logits, before) and fingerprint(model) == mark
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_a_refusal_of_peft_leaves_nothing_either(llama, monkeypatch):
    modules = [id(module) for module in llama.modules()]
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.input_layernorm"]
    with pytest.raises(AUSteerError, match="PEFT puts no LoRA"), rank_one(llama, names, 0):
        pass
    assert [id(module) for module in llama.modules()] == modules


def test_peft_and_the_adapter_agree(llama, tokenizer):
    """What PEFT's own module computes in training is what the adapter computes afterwards."""
    names = ["model.layers.1.self_attn.o_proj"]
    with rank_one(llama, names, 3) as terms:
        ((a, b),) = terms.values()
        b.data.fill_(0.1)
        by_peft, factors = llama(IDS).logits.detach(), {names[0]: (a.detach().clone(), b.detach().clone())}
    with applied(llama, Adapter(factors)):
        assert torch.allclose(llama(IDS).logits, by_peft, atol=1e-5)


def test_options_seed_and_strength(llama, tokenizer):
    learned = [
        LoRA(**options).prepare(evidence_of(llama, tokenizer, PAIRS[:10], seed=seed)).factors
        for options, seed in (({}, 0), ({}, 0), ({"rate": 1e-2}, 0), ({"epochs": 1}, 0), ({}, 1))
    ]
    ups = [torch.cat([up for _, up in factors.values()]) for factors in learned]
    assert torch.equal(ups[0], ups[1])
    assert all(not torch.allclose(ups[0], other, atol=1e-5) for other in ups[2:])
    adapter = LoRA(epochs=1).prepare(evidence_of(llama, tokenizer, PAIRS[:4]))
    point = LoRA().plan(adapter, {"strength": 0.5})
    assert point.strength == 0.5 and adapter.strength == 1 and point.header["strength"] == 0.5
    assert point.header["tau"] > 0 and point.header["method"] == "lora-r1"


@pytest.mark.parametrize("kind", BUDGET)
def test_the_grid_fits_the_budget(kind):
    grid = LoRA().grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and {"strength": 1.0} in grid
    assert [point["strength"] for point in grid] == sorted({point["strength"] for point in grid})


def test_it_runs_as_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 100)
    BENCHES.close()
    record = computed(tmp_path, task="svamp", limit=60, method="lora-r1", site="attention")
    vanilla = computed(tmp_path, task="svamp", limit=60, method="vanilla")
    assert record["right"] - vanilla["right"] >= 4 and len(record["grid_scores"]) == 15
    assert record["receipt"]["modules"] == 4 and record["receipt"]["positions"] > 60
    assert record["touched"] == 0 and record["numbers"] == 4 * 256
    BENCHES.close()
