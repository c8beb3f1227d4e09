"""HardConcrete gates: their formulas by hand, training by a plain loop, and that they choose k."""

import math

import pytest
import torch
from conftest import PAIRS
from one_cell import computed
from test_rival_methods import evidence_of, upstream_of

import rmodels
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.l0_gates import PENALTIES, L0Gates, chance_of_open, sampled, settled
from austeer.methods.training import TemperedLoss
from austeer.steering import steer
from experiments.bench import BENCHES

IDS = torch.tensor([[1, 40, 77, 130]])


def test_gates_by_hand():
    a = torch.tensor([-3.0, 0.0, 0.5, 4.0])
    # sigmoid(0) = 0.5 is stretched to 1.2 * 0.5 - 0.1 = 0.5; sigmoid(-3) = .047 falls below 0, sigmoid(4) = .982 above 1
    assert settled(a).tolist() == pytest.approx([0.0, 0.5, 1.2 / (1 + math.exp(-0.5)) - 0.1, 1.0])
    torch.manual_seed(0)
    u = torch.rand(4, generator=torch.Generator().manual_seed(7)).tolist()
    expected = []
    for one, value in zip(u, a.tolist(), strict=True):
        s = 1 / (1 + math.exp(-(math.log(one) - math.log(1 - one) + value) / (2 / 3)))
        expected.append(min(1.0, max(0.0, 1.2 * s - 0.1)))
    assert sampled(a, torch.Generator().manual_seed(7)).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_chance_of_an_open_gate_is_a_frequency():
    a, generator = torch.tensor([-2.0, 0.0, 1.0]), torch.Generator().manual_seed(0)
    opened = sum((sampled(a, generator) > 0).double() for _ in range(20_000)) / 20_000
    assert torch.allclose(opened, chance_of_open(a).double(), atol=0.012)


def odds_with_gates(model, tokenizer, pair, scales):
    prompt, *answers = pair
    two = [tokenizer(prompt + answer)["input_ids"] for answer in answers]
    shared = next(i for i in range(99) if two[0][i] != two[1][i])
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, s=s: (args[0] * (1 + s),))
        for layer, s in zip(model.model.layers, scales, strict=True)
    ]
    total = []
    for ids in two:
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total.append(sum(logp[t - 1, ids[t]] for t in range(shared, len(ids))))
    for hook in hooks:
        hook.remove()
    return total[0] - total[1]


def test_training_is_that_of_a_plain_loop(llama, checkpoints, tokenizer):
    """Three steps: Adam written out, the draws in the same order, one batch a step."""
    evidence = evidence_of(llama, tokenizer, PAIRS[:3])
    loss = TemperedLoss(evidence)
    actual = L0Gates(epochs=3)._train(evidence, loss, 1.5)["attention"]
    upstream, tau, generator = upstream_of(checkpoints["llama"]), loss.temperature.tau, torch.Generator().manual_seed(0)
    a = [torch.full((64,), 2.0, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    g = [torch.zeros(64, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    first, second = ([torch.zeros(64, dtype=torch.float64) for _ in range(6)] for _ in range(2))
    batches = len(evidence.batches())
    for step in range(1, 4):
        total, draws = 0.0, []
        order = [[pair.index for pair in batch] for batch in evidence.batches()]
        for batch in order:  # an epoch is one step here, and each of its batches draws its own gates
            z = []
            for values in a:
                u = torch.rand(64, generator=generator).double()
                s = torch.sigmoid((u.log() - (1 - u).log() + values) / (2 / 3))
                z.append((1.2 * s - 0.1).clamp(0, 1))
            draws.append(z)
            for j in batch:
                odds = odds_with_gates(upstream, tokenizer, PAIRS[j], [x * y for x, y in zip(z, g, strict=True)])
                total = total + torch.log1p(torch.exp(-odds / tau)) / 3
        opened = [torch.sigmoid(values - 2 / 3 * math.log(0.1 / 1.1)) for values in a]
        total = total + 1.5 * sum(one.sum() for one in opened) / 192
        for i, gradient in enumerate(torch.autograd.grad(total, a + g)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            rate = 0.1 if i < 3 else 0.02
            with torch.no_grad():
                (a + g)[i].sub_(rate * first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-8))
    assert batches >= 1 and actual.abs().max() > 0.03
    for layer in range(3):
        expected = (1.2 * torch.sigmoid(a[layer]) - 0.1).clamp(0, 1) * g[layer]
        assert torch.allclose(actual[layer].double(), expected.detach(), atol=2e-3)


@pytest.mark.slow
@pytest.mark.slow
def test_a_larger_penalty_keeps_fewer_aus(llama, tokenizer):
    evidence = evidence_of(llama, tokenizer)
    loss = TemperedLoss(evidence)
    kept = [int((L0Gates(epochs=25)._train(evidence, loss, l0)["attention"] != 0).sum()) for l0 in (2.0, 0.2, 0.02)]
    assert kept[0] < kept[1] < kept[2] < 192


@pytest.mark.parametrize("site", ["attention", "neuron", "both"])
def test_plans(site, llama, tokenizer):
    method, before = L0Gates(epochs=2), llama(IDS).logits
    prepared = method.prepare(evidence_of(llama, tokenizer, PAIRS[:5], site))
    assert torch.equal(llama(IDS).logits, before) and all(gate.idle for gate in rmodels.gates(llama))
    one, two = (method.plan(prepared, {"l0": 1.5, "alpha": alpha}) for alpha in (1.0, 2.0))
    assert one.sites == (["attention", "ffn"] if site == "both" else [site])
    assert one.header["k"] == len(one) > 0 and one.header["tau"] > 0
    for au, doubled in zip(one.aus(), two.aus(), strict=True):
        assert doubled[3] == pytest.approx(2 * au[3]) and au[4] == 0
    with steer(llama, one):  # checks the fingerprint
        assert not torch.equal(llama(IDS).logits, before)
    again = method.plan(method.prepare(evidence_of(llama, tokenizer, PAIRS[:5], site)), {"l0": 1.5, "alpha": 1.0})
    assert again.aus() == one.aus()


def test_every_option_changes_the_plan(llama, tokenizer):
    plans = []
    for options, seed in (({}, 0), ({"rate": 0.03}, 0), ({"gate_rate": 0.3}, 0), ({"epochs": 5}, 0), ({}, 1)):
        evidence = evidence_of(llama, tokenizer, PAIRS[:10], seed=seed)
        plans.append(L0Gates(**options)._train(evidence, TemperedLoss(evidence), 1.5)["attention"])
    assert all(not torch.allclose(one, other, atol=1e-4) for i, one in enumerate(plans) for other in plans[:i])


@pytest.mark.parametrize("kind", BUDGET)
def test_the_grid_fits_the_budget_and_begins_gently(kind):
    grid = L0Gates().grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and {point["l0"] for point in grid} == set(PENALTIES["full"])
    assert grid[0] == {"l0": max(point["l0"] for point in grid), "alpha": min(point["alpha"] for point in grid)}


def test_it_runs_as_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 100)
    BENCHES.close()
    record = computed(tmp_path, task="svamp", limit=60, method="l0-gates", site="attention")
    vanilla = computed(tmp_path, task="svamp", limit=60, method="vanilla")
    assert record["right"] - vanilla["right"] >= 4 and 0 < record["touched"] < 512
    BENCHES.close()
