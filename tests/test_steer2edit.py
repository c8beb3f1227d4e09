"""Steer2Edit: every edit by plain loops over heads and neurons, from upstream's weights."""

import math

import pytest
import torch
from conftest import PAIRS, save_tiny
from one_cell import computed
from reference import hooked
from test_rival_methods import evidence_of, upstream_of
from transformers import AutoConfig

import rmodels
from austeer.change import applied, projections
from austeer.errors import AUSteerError
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.steer2edit import Steer2Edit, directions_of, elastic_net, transposed_weight
from experiments.bench import BENCHES

IDS = torch.tensor([[1, 40, 77, 130]])


def answer_means(model, tokenizer, site):
    """Return what enters each projection, by layer, over the tokens of an answer: the mean of right and of wrong texts."""
    sums = [[0.0] * 3, [0.0] * 3]
    for prompt, *answers in PAIRS:
        two = [tokenizer(prompt + answer)["input_ids"] for answer in answers]
        shared = next(i for i in range(999) if two[0][i] != two[1][i])
        for side, ids in enumerate(two):
            seen = {}
            with (
                hooked(model, site, lambda layer, x, seen=seen: seen.__setitem__(layer, x[0].clone())),
                torch.no_grad(),
            ):
                model(torch.tensor([ids]))
            for layer in range(3):
                sums[side][layer] = sums[side][layer] + seen[layer][shared:].mean(0) / len(PAIRS)
    return sums


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("site, rho, s", [("attention", 0.3, 0.7), ("neuron", 0.2, 0.65)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_edits_are_those_of_plain_loops(name, site, rho, s, checkpoints, tokenizer):
    model, upstream = rmodels.load(checkpoints[name], dtype="float32", device="cpu"), upstream_of(checkpoints[name])
    method = Steer2Edit()
    adapter = method.plan(method.prepare(evidence_of(model, tokenizer, site=site)), {"rho": rho, "sparsity": s})
    right, wrong = answer_means(upstream, tokenizer, site)
    edited = 0
    for layer, (down, up) in enumerate(adapter.factors.values()):
        block = upstream.model.layers[layer]
        weight = block.self_attn.o_proj.weight.data if site == "attention" else block.mlp.down_proj.weight.data
        vector = [dot(row, right[layer]) - dot(row, wrong[layer]) for row in weight]
        length = math.sqrt(dot(vector, vector))
        size = 16 if site == "attention" else 1
        expected = torch.zeros_like(weight)
        for first in range(0, weight.shape[1], size):
            part = weight[:, first : first + size]
            mean = [(float(right[layer][i]) + float(wrong[layer][i])) / 2 for i in range(first, first + size)]
            written = [dot(row, mean) for row in part]
            importance = dot(vector, written) / length / math.sqrt(dot(written, written))
            into = [dot(part[:, i], vector) for i in range(size)]
            norm = math.sqrt(dot(into, into))
            strength = max(abs(importance) - rho * s, 0) / (rho * (1 - s)) * (1 if importance > 0 else -1)
            edited += strength != 0
            for i in range(size):
                for out in range(len(weight)):
                    expected[out, first + i] = strength * vector[out] / length * into[i] / norm
        assert torch.allclose((up @ down).double(), expected, atol=1e-4)
    components = 12 if site == "attention" else 240
    assert 0 < edited < components and adapter.header["k"] == edited, "some are left alone"


def test_a_component_worked_by_hand():
    """Two neurons write (3, 4) and (4, -3), v is along the second axis: cosines .8 and -.6, the second one's turned twice."""
    weight = torch.tensor([[3.0, 4.0], [4.0, -3.0]])  # (inputs, outputs)
    made = directions_of(weight, torch.tensor([[2.0], [1.0]]), torch.tensor([0.16, -0.12]))
    assert made.out_of.tolist() == pytest.approx([0.0, 1.0], abs=1e-6) and made.into.tolist() == [[1.0], [-1.0]]
    assert made.importance.tolist() == pytest.approx([0.8, -0.6])
    # (.8 - .5 * .9) / (.5 * .1) = 7, (.6 - .45) / .05 = 3: both push along v where their mean is
    assert elastic_net(made.importance, 0.5, 0.9).tolist() == pytest.approx([7.0, -3.0], rel=1e-4)
    assert elastic_net(made.importance, 0.7, 0.9).tolist() == pytest.approx([0.17 / 0.07, 0.0], rel=1e-4)


def test_the_elastic_net_is_a_maximum():
    c, rho, s = torch.tensor([0.8, -0.3, 0.1]), 0.4, 0.6
    best = elastic_net(c, rho, s)

    def value(x):
        return float(c @ x - rho * (s * x.abs().sum() + (1 - s) * x.square().sum() / 2))

    for i in range(3):
        for step in (0.05, -0.05):
            moved = best.clone()
            moved[i] += step
            assert value(moved) < value(best)


def test_weights_are_read_of_any_projection(llama, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=48, n_layer=2, n_head=4, vocab_size=320, n_positions=64)
    gpt2 = rmodels.load(save_tiny(tmp_path, config), dtype="float32", device="cpu")
    for model, turned in ((llama, True), (gpt2, False)):
        for module in projections(model, ["attention", "neuron"]).values():
            if module.bias is not None:
                module.bias.data.fill_(0.5)  # must not count
            weight = module.weight.data.T if turned else module.weight.data
            assert torch.allclose(transposed_weight(model, module), weight, atol=1e-6)


@pytest.mark.parametrize("site, modules", [("attention", 3), ("ffn", 3), ("both", 6), ("attention+neuron", 6)])
def test_sites(site, modules, llama, tokenizer):
    method, before = Steer2Edit(), llama(IDS).logits
    adapter = method.plan(method.prepare(evidence_of(llama, tokenizer, PAIRS[:3], site)), {"rho": 0.2, "sparsity": 0.7})
    assert (
        list(adapter.factors) == list(projections(llama, site.replace("both", "attention+neuron").split("+")))
        and len(adapter) == modules
    )
    with applied(llama, adapter):  # checks the fingerprint
        assert not torch.equal(llama(IDS).logits, before)
    assert torch.equal(llama(IDS).logits, before)


def test_experts_are_refused(checkpoints, tokenizer):
    moe = rmodels.load(checkpoints["qwen3_moe"], dtype="float32", device="cpu")
    with pytest.raises(AUSteerError, match="fused experts"):
        Steer2Edit().prepare(evidence_of(moe, tokenizer, PAIRS[:2], "neuron"))
    assert len(Steer2Edit().prepare(evidence_of(moe, tokenizer, PAIRS[:2], "attention"))[0]) == 3


@pytest.mark.parametrize("kind", BUDGET)
def test_the_grid_fits_the_budget_and_begins_gently(kind):
    grid = Steer2Edit().grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind]
    assert grid[0] == {key: max(point[key] for point in grid) for key in grid[0]}, "the fewest components"


def test_it_runs_as_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 60)
    BENCHES.close()
    record = computed(tmp_path, task="tone", limit=20, method="steer2edit", site="attention")
    assert len(record["grid_scores"]) == 15 and record["n"] == 20
    BENCHES.close()
