"""AUSteer's rivals and controls: against their formulas as plain loops, and end to end."""

import functools
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import PAIRS
from one_cell import computed
from reference import hooked, last_activations, log_odds
from transformers import AutoModelForCausalLM

import austeer.methods
import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods import registry
from austeer.methods.all_aus import AllAUs
from austeer.methods.attribution import AttributionAUs, AttributionHeads, Scores, gradients
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.learned_scaling import LearnedScaling, loss
from austeer.methods.linear_act import ALL, LOWER, UPPER, LinearAcT, Transport, fit
from austeer.methods.mean_difference import MeanDifference
from austeer.methods.mediation import Mediation, effects
from austeer.methods.registry import METHODS
from austeer.pairs import Pair
from austeer.steering import steer
from experiments.bench import BENCHES
from MFU_screening import screen

ROOT = Path(__file__).parents[1]
OURS = [AllAUs(), MeanDifference(), LinearAcT(), AttributionAUs(), AttributionHeads(), Mediation(), LearnedScaling()]
FAST = [method if method.name != "learned-scaling" else LearnedScaling(epochs=1) for method in OURS]


def evidence_of(model, tokenizer, pairs=PAIRS, site="attention", seed=0):
    pairs = [Pair(*pair) for pair in pairs]

    @functools.cache
    def ranks(momentum):
        return screen(pairs, model, tokenizer, [site], momentum=momentum, progress=False)[site]

    return Evidence(model, tokenizer, pairs, site, ranks, seed)


@pytest.fixture(scope="module")
def evidence(llama, tokenizer):
    return evidence_of(llama, tokenizer)


def upstream_of(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager").eval()


def shift_one(layer, dims, by):
    """Return a hook that adds `by` to some dimensions of one layer, at all positions."""

    def change(index, x):
        if index != layer:
            return None
        x = x.clone()
        x[..., dims] += by.to(x)
        return x

    return change


def settings_of(method):
    return method.grid("small")[-1]


# what every method must do


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", BUDGET)
def test_grids_fit_the_budget_and_begin_gently(method, kind):
    grid = method.grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and len(
        {tuple(settings.values()) for settings in grid}
    ) == len(grid)
    strength = "lambda" if method.name == "linear-act" else "alpha"
    assert grid[0][strength] == min(settings[strength] for settings in grid)
    assert all(grid[0][key] == min(s[key] for s in grid) for key in grid[0] if key != "layers")


@pytest.mark.parametrize("method", FAST, ids=lambda method: method.name)
def test_plans_steer_their_model_and_say_what_they_were_made_for(method, evidence, llama):
    plan = method.plan(method.prepare(evidence), settings_of(method))
    ids = torch.tensor([[1, 40, 77, 130, 9, 200]])
    with steer(llama, plan):  # checks the fingerprint
        steered = llama(ids).logits
    assert len(plan) and not torch.equal(steered, llama(ids).logits)
    assert plan.header["fingerprint"] and plan.header["site"] == "attention"


@pytest.mark.parametrize("method", FAST, ids=lambda method: method.name)
def test_one_pair_is_enough_and_equal_answers_are_refused(method, llama, tokenizer):
    plan = method.plan(method.prepare(evidence_of(llama, tokenizer, PAIRS[:1])), settings_of(method))
    assert all(math.isfinite(value) for au in plan.aus() for value in au[3:])
    with pytest.raises(AUSteerError, match=r"the same tokens|two different ones"):
        method.prepare(evidence_of(llama, tokenizer, [("Is it?", " yes", " yes")] * 2))


@pytest.mark.parametrize("method", FAST, ids=lambda method: method.name)
def test_same_evidence_same_plan(method, llama, tokenizer):
    plans = [
        method.plan(method.prepare(evidence_of(llama, tokenizer, PAIRS[:5])), settings_of(method)).aus()
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


# controls


def test_all_aus(evidence):
    ranks = evidence.ranks("activation")
    plan = AllAUs().plan(ranks, {"alpha": 0.3})
    assert torch.equal(plan.scales["attention"], 0.3 * ranks.gain) and not plan.shifts
    assert len(plan) == int((ranks.gain != 0).sum()) > 0.9 * ranks.gain.numel()


def test_mean_difference(evidence):
    right, wrong = evidence.activations()
    differences = {
        (layer, dim): sum(float(right[j, layer, dim] - wrong[j, layer, dim]) for j in range(len(right))) / len(right)
        for layer in range(right.shape[1])
        for dim in range(right.shape[2])
    }
    expected = sorted(differences, key=lambda au: -abs(differences[au]))[:5]
    plan = MeanDifference().plan(evidence.ranks("activation"), {"k": 5, "alpha": 2.0})
    actual = {au[1:3]: au[3:] for au in plan.aus()}
    assert set(actual) == set(expected)
    for au, (scale, shift) in actual.items():
        assert scale == 0 and shift == pytest.approx(2 * differences[au], rel=1e-4)


# Linear-AcT


def plain_fit(a, b):
    a, b = sorted(a), sorted(b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((x - mean_a) ** 2 for x in a)
    omega = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread if spread else 1.0
    return omega, mean_b - omega * mean_a


def test_transport_worked_by_hand():
    # sorted, 0 1 2 goes to 1 2 6: omega = (-1 * -2 + 1 * 3) / 2 = 2.5, beta = 3 - 2.5 = 0.5
    omega, beta = fit(torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[6.0], [1.0], [2.0]]))
    assert (float(omega), float(beta)) == (2.5, 0.5)


def test_transport_equals_the_plain_loop():
    torch.manual_seed(0)
    source, target = torch.randn(9, 2, 5), 3 * torch.randn(9, 2, 5) + 1
    source[:, 0, 1] = 0.1  # constant, and not exactly so in float32 sums
    source[:, 1, 2] = target[:, 1, 2] = 7.0  # constant in both
    source[:, 0, 3] = 0.0
    omega, beta = fit(source, target)
    for layer in range(2):
        for dim in range(5):
            expected = plain_fit(*(x[:, layer, dim].double().tolist() for x in (source, target)))
            if (layer, dim) in ((0, 1), (0, 3)):
                expected = 1.0, float(target[:, layer, dim].mean() - source[0, layer, dim])
            assert (float(omega[layer, dim]), float(beta[layer, dim])) == pytest.approx(expected, abs=1e-5)
    assert (omega[1, 2], beta[1, 2]) == (1, 0)


def test_transport_at_full_strength_turns_wrong_into_right():
    """Right values that are an affine map of the wrong ones are met exactly, whatever the order of the texts."""
    torch.manual_seed(0)
    wrong = torch.randn(20, 4, 6)
    right = 2.5 * wrong[torch.randperm(20)] - 1
    prepared = Transport(*fit(wrong, right), {"site": "ffn"})
    plan = LinearAcT().plan(prepared, {"lambda": 1.0, "layers": ALL})
    gate = rmodels.AUGate("ffn", 2, 6)
    gate.set(plan.scale("ffn", 2), plan.shift("ffn", 2), like=torch.zeros(1))
    assert torch.allclose(gate(wrong[None, :, 2]), 2.5 * wrong[None, :, 2] - 1, atol=1e-5)
    part = LinearAcT().plan(prepared, {"lambda": 0.2, "layers": ALL})
    gate.set(part.scale("ffn", 2), part.shift("ffn", 2), like=torch.zeros(1))
    assert torch.allclose(
        gate(wrong[None, :, 2]), 0.8 * wrong[None, :, 2] + 0.2 * (2.5 * wrong[None, :, 2] - 1), atol=1e-5
    )


def test_transport_by_layers(evidence):
    prepared = LinearAcT().prepare(evidence)
    touched = {
        layers: {au[1] for au in LinearAcT().plan(prepared, {"lambda": 0.5, "layers": layers}).aus()}
        for layers in (ALL, LOWER, UPPER)
    }
    assert touched == {ALL: {0, 1, 2}, LOWER: {0}, UPPER: {1, 2}}
    with pytest.raises(AUSteerError, match="layers must be 0"):
        LinearAcT().plan(prepared, {"lambda": 0.5, "layers": 3})


def test_transport_is_from_wrong_to_right(evidence):
    right, wrong = evidence.activations()
    prepared = LinearAcT().prepare(evidence)
    mapped = wrong.mean(0) * prepared.omega + prepared.beta
    assert torch.allclose(mapped, right.mean(0), atol=1e-4)


# attribution and mediation


@pytest.mark.parametrize("site", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attribution_is_the_derivative_of_the_log_odds(checkpoints, tokenizer, name, site):
    model, upstream = rmodels.load(checkpoints[name], dtype="float32", device="cpu"), upstream_of(checkpoints[name])
    pairs = PAIRS[:5]
    evidence = evidence_of(model, tokenizer, pairs, site)
    actual = gradients(evidence)
    scores = AttributionAUs().prepare(evidence).score
    for layer, dim in ((0, 3), (1, 40), (2, 17)):
        total = 0.0
        for j, pair in enumerate(pairs):
            odds = []
            for step in (3e-3, -3e-3):  # norms and softmax are float32 in any model
                with hooked(upstream, site, shift_one(layer, [dim], torch.tensor(step))):
                    odds.append(log_odds(upstream, tokenizer, *pair))
            slope = (odds[0] - odds[1]) / 6e-3
            assert float(actual[j, layer, dim]) == pytest.approx(slope, rel=3e-3, abs=1e-3)
            right, wrong = (last_activations(upstream, tokenizer, pair[0] + text, site) for text in pair[1:])
            total += slope * float(right[layer, dim] - wrong[layer, dim])
        assert float(scores[layer, dim]) == pytest.approx(total / len(pairs), rel=5e-3, abs=1e-3)


def test_a_heads_attribution_is_the_sum_of_its_aus(evidence):
    units, heads = AttributionAUs().prepare(evidence).score, AttributionHeads().prepare(evidence).score
    assert heads.shape == (3, 4)  # 64 AUs per layer: 4 heads of 16, though the model is 48 wide
    for layer in range(3):
        for head in range(4):
            assert float(heads[layer, head]) == pytest.approx(
                sum(float(units[layer, 16 * head + i]) for i in range(16)), abs=1e-5
            )


@pytest.mark.parametrize("tokens", [1, 1024])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_mediation_patches_one_head_at_a_time(checkpoints, tokenizer, name, tokens, monkeypatch):
    monkeypatch.setattr("austeer.methods.mediation.ROW_TOKENS", {"cpu": tokens})
    model, upstream = rmodels.load(checkpoints[name], dtype="float32", device="cpu"), upstream_of(checkpoints[name])
    evidence = evidence_of(model, tokenizer, PAIRS[:3])
    for j in (0, 1, 2):  # one of them has a long answer
        pair = PAIRS[j]
        right, wrong = (last_activations(upstream, tokenizer, pair[0] + text, "attention") for text in pair[1:])
        actual = effects(evidence, evidence.encoded()[j], (right - wrong).float())
        vanilla = log_odds(upstream, tokenizer, *pair)
        for layer, head in ((0, 0), (0, 3), (1, 2), (2, 1)):
            dims = list(range(16 * head, 16 * head + 16))
            with hooked(upstream, "attention", shift_one(layer, dims, (right - wrong)[layer, dims])):
                expected = log_odds(upstream, tokenizer, *pair) - vanilla
            assert float(actual[layer, head]) == pytest.approx(expected, rel=2e-3, abs=2e-4)


def test_attribution_is_mediation_to_first_order(evidence):
    pair, little = evidence.encoded()[1], 1e-2
    difference = torch.sub(*evidence.activations())[1]
    exact = effects(evidence, pair, little * difference) / little
    estimate = (gradients(evidence)[1] * difference).unflatten(-1, (4, 16)).sum(-1)
    assert torch.allclose(exact, estimate, rtol=0.05, atol=0.02)


def test_mediation_averages_over_pairs_and_spreads_them(evidence):
    difference = torch.sub(*evidence.activations())
    encoded = evidence.encoded()
    one_by_one = torch.stack([effects(evidence, pair, d) for pair, d in zip(encoded, difference, strict=True)])
    assert torch.allclose(Mediation().prepare(evidence).score, one_by_one.mean(0), atol=1e-5)
    some = Mediation(most_pairs=4).prepare(evidence).score
    assert torch.allclose(some, one_by_one[[0, 4, 8, 12]].mean(0), atol=1e-5)
    assert not torch.allclose(some, one_by_one.mean(0), atol=1e-3)


@pytest.mark.parametrize("method", [AttributionHeads(), Mediation()], ids=lambda method: method.name)
def test_the_best_heads_are_shifted_by_their_mean_difference(method, evidence):
    prepared = method.prepare(evidence)
    difference = torch.sub(*evidence.activations()).mean(0)
    order = sorted(
        ((float(prepared.score[layer, head]), -layer, -head) for layer in range(3) for head in range(4)), reverse=True
    )[:2]
    assert order[1][0] > 0
    plan = method.plan(prepared, {"heads": 2, "alpha": 3.0})
    assert {(au[1], au[2] // 16) for au in plan.aus()} == {(-layer, -head) for _, layer, head in order}
    assert len(plan) == 32 and not plan.scales
    for _, layer, dim, scale, shift in plan.aus():
        assert scale == 0 and shift == pytest.approx(3 * float(difference[layer, dim]), rel=1e-5)


def test_heads_and_aus_of_positive_score_are_shifted():
    score = torch.tensor([[0.5, -3.0, 2.0], [2.0, 0.0, 1.0]])
    header, method = {"site": "attention"}, AttributionAUs()

    def shifted(k, width=3):
        prepared = Scores(score, torch.ones(2, width), header)
        return method.plan(prepared, {"k": k, "alpha": 1.0}).shifts["attention"].bool()

    assert shifted(1).nonzero().tolist() == [[0, 2]]  # a tie: the lower layer
    assert shifted(3).nonzero().tolist() == [[0, 2], [1, 0], [1, 2]]
    assert shifted(6).sum() == 4  # never a shift the wrong way, nor one that does nothing
    assert shifted(2, width=6)[0].tolist() == [False] * 4 + [True] * 2
    for k in (0, 7, 1.5, True):
        with pytest.raises(AUSteerError, match="k must be a whole number from 1 to 6"):
            shifted(k)


def test_no_difference_no_shift(evidence, monkeypatch):
    monkeypatch.setattr(Evidence, "activations", lambda self: (torch.ones(16, 3, 64), torch.ones(16, 3, 64)))
    for method in (AttributionAUs(), AttributionHeads(), Mediation(most_pairs=2)):
        assert len(method.plan(method.prepare(evidence), settings_of(method))) == 0
    prepared = LinearAcT().prepare(evidence)
    assert len(LinearAcT().plan(prepared, {"lambda": 1.0, "layers": ALL})) == 0


# learned scaling


def test_the_first_step_goes_where_causal_momentum_points(evidence):
    """Adam's first step is the learning rate times the sign of the gradient, whatever its size."""
    prepared = LearnedScaling(l1=0.0, rate=0.02, epochs=1).prepare(evidence)  # 16 pairs: one step
    gain = evidence.ranks("causal").gain
    assert torch.allclose(prepared.scale, 0.02 * gain, atol=1e-4)


def mean_loss(evidence, scale):
    with torch.no_grad():
        return sum(float(loss(evidence, [pair], dict(enumerate(scale)))) for pair in evidence.encoded())


def test_training_lowers_the_loss_and_l1_the_scalars(evidence):
    few, many = (LearnedScaling(l1=0.0, epochs=epochs).prepare(evidence).scale for epochs in (1, 8))
    start, first, last = (mean_loss(evidence, scale) for scale in (torch.zeros_like(few), few, many))
    assert last < first < start
    pulled = LearnedScaling(l1=1.0, epochs=8).prepare(evidence).scale
    assert pulled.abs().sum() < 0.5 * many.abs().sum()


def test_loss_is_that_of_the_log_odds(evidence, llama, checkpoints, tokenizer):
    upstream, torch_generator = upstream_of(checkpoints["llama"]), torch.Generator().manual_seed(0)
    scale = 0.3 * torch.randn(3, 64, generator=torch_generator)

    def change(layer, x):
        return x * (1 + scale[layer].to(x))

    expected = 0.0
    with hooked(upstream, "attention", change):
        for pair in PAIRS:
            expected += math.log1p(math.exp(-log_odds(upstream, tokenizer, *pair)))
    assert mean_loss(evidence, scale) == pytest.approx(expected, rel=1e-4)


def test_every_option_of_learned_scaling_changes_the_plan(evidence, llama, tokenizer):
    pairs = PAIRS + [(prompt + " Well,", right, wrong) for prompt, right, wrong in PAIRS[:8]]  # more than one step
    learned = [
        LearnedScaling(**options).prepare(evidence_of(llama, tokenizer, pairs, seed=seed)).scale
        for options, seed in (({}, 0), ({"l1": 0.1}, 0), ({"rate": 0.01}, 0), ({"epochs": 2}, 0), ({}, 1))
    ]
    for i, one in enumerate(learned):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in learned[:i])


def test_the_largest_scalars_are_kept(evidence):
    method = LearnedScaling(epochs=2)
    prepared = method.prepare(evidence)
    plan = method.plan(prepared, {"k": 7, "alpha": 2.0})
    kept = {au[1:3] for au in plan.aus()}
    smallest = min(abs(float(prepared.scale[au])) for au in kept)
    others = [
        abs(float(prepared.scale[layer, dim])) for layer in range(3) for dim in range(64) if (layer, dim) not in kept
    ]
    assert len(kept) == 7 and max(others) <= smallest and not plan.shifts
    assert all(au[3] == pytest.approx(2 * float(prepared.scale[au[1:3]])) for au in plan.aus())


def test_nothing_is_left_on_the_model(evidence, llama):
    ids = torch.tensor([[1, 40, 77]])
    before = llama(ids).logits
    for method in FAST:
        method.prepare(evidence)
    assert torch.equal(llama(ids).logits, before)
    assert all(gate.idle for gate in rmodels.gates(llama))
    assert all(weight.grad is None for weight in llama.parameters())


# end to end


@pytest.fixture
def registered(monkeypatch):
    for method in OURS:
        monkeypatch.setitem(METHODS, method.name, method)
    BENCHES.close()
    yield
    BENCHES.close()


def test_on_an_embedded_task(tmp_path, registered, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 200)
    few = {"task": "svamp", "limit": 60}
    gains, grids = {}, {method.name: method.grid("small") for method in OURS}
    for method in OURS:
        points = [grids[method.name][0], grids[method.name][7]]
        monkeypatch.setattr(type(method), "grid", lambda self, kind, points=points: points)
        record = computed(tmp_path, **few, method=method.name, site="attention")
        assert record["n"] == 60 and len(record["grid_scores"]) == 2
        gains[method.name] = record["right"] - computed(tmp_path, **few, method="vanilla")["right"]
    assert gains["learned-scaling"] >= 4


# the documents


def test_the_example_of_the_guide_is_a_method(tmp_path, monkeypatch, evidence, llama):
    """The file printed in docs/methods.md is a method that prepares, plans and steers."""
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.S)
        if "(Method)" in block
    ]
    (tmp_path / "shift_one_layer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from shift_one_layer import ShiftOneLayer

    method = ShiftOneLayer()
    assert code.count("\n") <= 40 and 0 < len(method.grid("small")) <= BUDGET["small"]
    prepared, settings = method.prepare(evidence), {"depth": 0.5, "alpha": 2.0}
    plan = method.plan(prepared, settings)
    difference = torch.sub(*evidence.activations()).mean(0)
    assert torch.allclose(plan.shift("attention", 1), 2 * difference[1], atol=1e-6)
    assert {au[1] for au in plan.aus()} == {1}
    with steer(llama, plan):
        pass


def test_a_file_in_the_folder_is_a_method(tmp_path, monkeypatch):
    (tmp_path / "dropped_in.py").write_text(
        "from austeer.methods.all_aus import AllAUs\n\n\nclass DroppedIn(AllAUs):\n    name = 'dropped-in'\n\n\n"
        "METHODS = (DroppedIn(),)\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(austeer.methods, "__path__", [*austeer.methods.__path__, str(tmp_path)])
        assert importlib.reload(registry).with_options("dropped-in", {}).label == "all AUs"
    assert list(importlib.reload(registry).METHODS) == list(METHODS)


def test_the_guide_names_every_method():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name in [*METHODS, *(method.name for method in OURS)]:
        assert f"`{name}`" in text, f"docs/methods.md says nothing of {name}"


def test_the_committed_costs_are_of_every_method():
    costs = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "methods-cpu.json").read_text())
    assert set(costs["methods"]) == set(METHODS)
