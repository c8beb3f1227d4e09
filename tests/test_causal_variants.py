"""Methods beyond the paper, and the ablations between the paper's and ours, against their formulas as plain loops."""

import functools
import math

import pytest
import torch
from conftest import PAIRS
from one_cell import computed, embedded_cell, store_in
from reference import hook_steering, hooked, log_odds
from transformers import AutoModelForCausalLM

import austeer.methods.greedy
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.austeer import Causal, CausalLocation, CausalSign, FixedStrength, Suppress
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.both_sites import CausalBoth
from austeer.methods.counted import CausalCounted
from austeer.methods.greedy import CausalGreedy
from austeer.methods.mean_difference import FixedVector
from austeer.methods.predicted import CausalPredicted, mean_log_sigmoid, predict
from austeer.methods.registry import METHODS
from austeer.methods.significance import CausalFDR, PublishedFDR, adjusted, sign_test, significant, t_test
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from experiments import report
from experiments.compare import in_protocol
from experiments.executors import base
from MFU_screening import screen

SEARCHED = [
    CausalBoth(),
    PublishedFDR(),
    CausalFDR(),
    CausalGreedy(),
    FixedStrength(),
    FixedVector(),
    Suppress(),
    CausalLocation(),
    CausalSign(),
    CausalCounted(),
]
# the tiny model finds every right answer unlikely: exchanged, some of them are likely
MIXED = [(prompt, *answers[:: 1 if i % 3 else -1]) for i, (prompt, *answers) in enumerate(PAIRS)]
OURS = [*SEARCHED, CausalPredicted(q=0.9)]  # untrained: hardly anything is significant


def site_of(method):
    return method.sites[0]


def evidence_of(model, tokenizer, pairs=PAIRS, site="attention"):
    pairs = [Pair(*pair) for pair in pairs]

    @functools.cache
    def ranks(momentum, at=site):
        return screen(pairs, model, tokenizer, [at], momentum=momentum, progress=False)[at]

    return Evidence(model, tokenizer, pairs, site, ranks)


@pytest.fixture(scope="module")
def evidence(llama, tokenizer):
    return evidence_of(llama, tokenizer)


@pytest.fixture(scope="module")
def mixed(llama, tokenizer):
    return evidence_of(llama, tokenizer, MIXED)


@pytest.fixture(scope="module")
def upstream(checkpoints):
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoints["llama"], dtype=torch.float64, attn_implementation="eager"
    )
    return loaded.eval()


def scales_of(plan, site="attention"):
    return {au[1:3]: au[3] for au in plan.aus() if au[0] == site}


def strongest(method):
    settings = method.grid("small")[-1]
    return settings | {"q": 0.9} if "q" in settings else settings


def by_magnitude(score):
    """Order (layer, dim) by |score|, ties to the lower layer and dimension, without torch's sort."""
    units = [(layer, dim) for layer in range(score.shape[0]) for dim in range(score.shape[1])]
    return sorted(units, key=lambda au: -abs(float(score[au])))


# what every method must do


@pytest.mark.parametrize("method", SEARCHED, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", BUDGET)
def test_grids_fit_the_budget_and_begin_gently(method, kind):
    grid = method.grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and len(
        {tuple(settings.values()) for settings in grid}
    ) == len(grid)
    gentle = max if method.name == "suppress" else min
    strength = "factor" if method.name == "suppress" else "alpha"
    assert grid[0][strength] == gentle(settings[strength] for settings in grid)
    assert all(grid[0][key] == min(s[key] for s in grid) for key in grid[0] if key != strength)


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_plans_steer_their_model_and_say_what_they_were_made_for(method, llama, tokenizer):
    evidence = evidence_of(llama, tokenizer, site=site_of(method))
    plan = method.plan(method.prepare(evidence), strongest(method))
    ids = torch.tensor([[1, 40, 77, 130, 9, 200]])
    with steer(llama, plan):  # checks the fingerprint
        steered = llama(ids).logits
    assert len(plan) and not torch.equal(steered, llama(ids).logits)
    assert plan.header["fingerprint"] and plan.header["site"] == site_of(method) and plan.header["momentum"]


def test_every_one_is_registered_and_the_authors_code_has_none_of_the_causal_ones():
    for method in OURS:
        assert type(METHODS[method.name]) is type(method)
        assert in_protocol("paper", method) == (not method.name.startswith("causal"))


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_one_pair_and_equal_answers(method, llama, tokenizer):
    """One pair has no t statistic; its counts are valid, but never significant."""
    one = evidence_of(llama, tokenizer, PAIRS[:1], site_of(method))
    if method.name.startswith("causal") and method.name != "causal-counted":
        with pytest.raises(AUSteerError, match="at least two pairs"):
            method.prepare(one)
    else:
        plan = method.plan(method.prepare(one), method.grid("small")[-1])
        assert (len(plan) == 0) == (method.name == "published-fdr")
        assert all(math.isfinite(value) for au in plan.aus() for value in au[3:])
    with pytest.raises(AUSteerError, match=r"the same tokens|two different ones"):
        method.prepare(evidence_of(llama, tokenizer, [("Is it?", " yes", " yes")] * 2, site_of(method)))


# both sites


def test_both_sites_are_ranked_together(llama, tokenizer):
    evidence = evidence_of(llama, tokenizer, site="both")
    alone = {site: evidence.ranks("causal", site).score for site in ("attention", "ffn")}
    assert alone["attention"].shape != alone["ffn"].shape  # 64 and 48 per layer
    expected = sorted(
        ((-abs(float(t)), place, i) for place, site in enumerate(alone) for i, t in enumerate(alone[site].flatten()))
    )[:20]
    plan = CausalBoth().plan(CausalBoth().prepare(evidence), {"k": 20, "alpha": 0.5})
    assert len(plan) == 20 and plan.sites == ["attention", "ffn"]
    for place, (site, t) in enumerate(alone.items()):
        units = {divmod(i, t.shape[1]) for _, at, i in expected if at == place}
        assert units and scales_of(plan, site) == {au: 0.5 * math.copysign(1, t[au]) for au in units}
    with pytest.raises(AUSteerError, match="from 1 to 336"):  # 3 layers of 64 + 48
        CausalBoth().plan(CausalBoth().prepare(evidence), {"k": 337, "alpha": 1.0})


def test_both_sites_are_one_cell(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 40)
    monkeypatch.setattr("experiments.executors.base.acceptance.latent_skill", lambda *args, **kwargs: None)
    few = {"task": "svamp", "limit": 10, "ks": [6], "alphas": [1.0]}
    cell = embedded_cell(**few, method="causal-both", site="both")
    ranking = base.Ranking(cell.model, cell.task, (cell,))
    assert base.rank(ranking, store_in(tmp_path)) == {"made": 2}
    made = {file.stem: AURanks.load(file) for file in (tmp_path / "ranks").rglob("*.safetensors")}
    assert set(made) == {"attention", "ffn"} and base.rank(ranking, store_in(tmp_path)) == {"made": 0}
    record = computed(tmp_path, **few, method="causal-both", site="both")
    assert record["site"] == "both" and record["touched"] == 6
    assert record["cost"]["prepare_s"] >= sum(ranks.header["seconds"] for ranks in made.values())
    lines = report.table([computed(tmp_path, **few, method="vanilla"), record], {"causal-both": "together"})
    assert "| together, Head+FFN | k=6, alpha=1 | 6 |" in lines


# significance


def test_sign_test_is_that_of_fair_coins():
    positive, negative = torch.tensor([[0, 10, 3], [7, 1, 250]]), torch.tensor([[0, 0, 3], [2, 1, 150]])
    actual = sign_test(positive.int(), negative.int())
    for place in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        fewer, n = int(min(positive[place], negative[place])), int(positive[place] + negative[place])
        tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
        assert float(actual[place]) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert actual[0, 0] == 1 and actual[0, 1] == pytest.approx(2 / 1024)


def test_t_test_of_the_tables():
    # 5 % two-sided: 2.228 at 10 degrees of freedom, 12.706 at one
    assert t_test(torch.tensor([-2.2281389, 0.0]), 11).tolist() == pytest.approx([0.05, 1.0], abs=1e-6)
    assert float(t_test(torch.tensor([12.706205]), 2)) == pytest.approx(0.05, abs=1e-6)


def test_benjamini_hochberg():
    # the first i are significant, for the largest i with p_(i) <= q i / n
    torch.manual_seed(0)
    p = torch.rand(4, 10).double() ** 4
    p[0, :3] = p[1, 0]  # ties
    for q in (0.001, 0.05, 0.3):
        ordered = sorted(p.flatten().tolist())
        passed = [value for i, value in enumerate(ordered, 1) if value <= q * i / 40]
        expected = p <= max(passed, default=-1)
        assert torch.equal(significant(adjusted(p), q), expected)
    assert 0 < int(significant(adjusted(p), 0.05).sum()) < int((p <= 0.05).sum())  # stricter than each alone
    for q in (0, 1, 2.0):
        with pytest.raises(AUSteerError, match="between 0 and 1"):
            significant(p, q)


def test_significant_aus_are_steered_as_published(evidence):
    ranks, method = evidence.ranks("activation"), PublishedFDR()
    prepared = method.prepare(evidence)
    plans = {q: method.plan(prepared, {"q": q, "alpha": 2.0}) for q in (1e-6, 0.05, 0.9)}
    actual = adjusted(sign_test(ranks.stats["positive"], ranks.stats["negative"]))
    for q, plan in plans.items():
        expected = {au: 2 * float(ranks.gain[au]) for au in by_magnitude(ranks.score) if float(actual[au]) <= q}
        assert scales_of(plan) == expected and plan.header["k"] == len(expected)
    assert len(plans[1e-6]) == 0 < len(plans[0.05]) < len(plans[0.9])  # 16 pairs: p is at least 2 / 2**16


def test_significant_causal_aus(evidence):
    ranks, method = evidence.ranks("causal"), CausalFDR()
    plan = method.plan(method.prepare(evidence), {"q": 0.5, "alpha": 0.5})
    actual = adjusted(t_test(ranks.score, len(PAIRS)))
    expected = {au: 0.5 * math.copysign(1, ranks.score[au]) for au in by_magnitude(ranks.score) if actual[au] <= 0.5}
    assert scales_of(plan) == expected and plan.header["k"] == len(expected) > 0
    assert set(expected) == set(by_magnitude(ranks.score)[: len(expected)])  # the best by |t|


def test_constant_activations_are_not_significant(llama):
    zeros = torch.zeros(3, 64)
    ranks = AURanks("attention", zeros, zeros, {"positive": zeros.int(), "negative": zeros.int()}, {"pairs": 9})
    for method in (PublishedFDR(), CausalFDR()):
        plan = method.plan(
            method.prepare(Evidence(llama, None, [], "attention", lambda momentum: ranks)), strongest(method)
        )
        assert len(plan) == 0 and plan.header["k"] == 0 and plan.sites == ["attention"]
        with steer(llama, plan):
            pass


# ranked again


def test_slopes_under_steering_are_of_the_steered_model(mixed, llama, tokenizer, upstream):
    """Slopes equal finite differences on the unpatched model in float64."""
    plan = Causal().plan(mixed.ranks("causal"), {"k": 6, "alpha": 0.7})
    with steer(llama, plan):
        actual = screen(mixed.pairs[:3], llama, tokenizer, ["attention"], momentum="causal", progress=False)[
            "attention"
        ]
    unsteered = screen(mixed.pairs[:3], llama, tokenizer, ["attention"], momentum="causal", progress=False)["attention"]
    others = [au for au in by_magnitude(actual.score) if au not in scales_of(plan)]
    for au in (others[0], others[40]):
        values = []
        for step in (1e-3, -1e-3):
            scale = plan.scales["attention"].double().clone()
            scale[au] = step
            with hooked(upstream, "attention", lambda layer, x, scale=scale: x * (1 + scale[layer].to(x))):
                values.append(sum(log_sigmoid(log_odds(upstream, tokenizer, *pair)) for pair in MIXED[:3]))
        slope = (values[0] - values[1]) / 2e-3
        assert float(actual.stats["sum"][au]) == pytest.approx(slope, rel=5e-3, abs=1e-4)
        assert float(unsteered.stats["sum"][au]) != pytest.approx(slope, rel=2e-2)


def log_sigmoid(m):
    return -math.log1p(math.exp(-m))


def by_hand(scales, shape):
    values = torch.zeros(shape)
    for au, scale in scales.items():
        values[au] = scale
    return Plan({"attention": values})


def test_greedy_ranks_again_after_4_and_16(evidence, llama, tokenizer):
    steered = {}
    for reach in (4, 16, 20):
        with steer(llama, by_hand(steered, (3, 64))):
            ranks = screen(evidence.pairs, llama, tokenizer, ["attention"], momentum="causal", progress=False)[
                "attention"
            ]
        for au in by_magnitude(ranks.score):
            if au not in steered and len(steered) < reach:
                steered[au] = 0.5 * math.copysign(1, ranks.score[au])
    method = CausalGreedy()
    plan = method.plan(method.prepare(evidence), {"k": 20, "alpha": 0.5})
    assert scales_of(plan) == steered
    assert set(steered) != set(by_magnitude(evidence.ranks("causal").score)[:20])  # ranking once finds others


def test_greedy_pays_once_for_an_alpha(evidence, monkeypatch):
    passes = []
    monkeypatch.setattr(
        austeer.methods.greedy, "screen", lambda *args, **kwargs: passes.append(1) or screen(*args, **kwargs)
    )
    method = CausalGreedy()
    prepared = method.prepare(evidence)
    n_passes, scales = {}, {}
    for k in (1, 20, 4, 17, 16):
        plan = method.plan(prepared, {"k": k, "alpha": 1.0})
        n_passes[k], scales[k] = plan.header["passes"], scales_of(plan)
    assert n_passes == {1: 1, 4: 1, 16: 2, 17: 3, 20: 3}
    assert len(passes) == 2  # in addition to the ranks
    assert scales[1].items() < scales[4].items() < scales[16].items() < scales[17].items() < scales[20].items()
    assert scales[1] == scales_of(Causal().plan(evidence.ranks("causal"), {"k": 1, "alpha": 1.0}))
    other = method.plan(prepared, {"k": 20, "alpha": 3.0})
    assert len(passes) == 4 and scales_of(other).keys() != scales[20].keys()
    with pytest.raises(AUSteerError, match="from 1 to 192"):
        method.plan(prepared, {"k": 193, "alpha": 1.0})
    assert len(passes) == 4
    assert len(method.plan(prepared, {"k": 192, "alpha": 1.0})) == 192  # and the last round is shorter


def test_greedy_with_hardly_any_strength_is_causal(evidence):
    settings = {"k": 16, "alpha": 1e-6}
    once = Causal().plan(evidence.ranks("causal"), settings)
    again = CausalGreedy().plan(CausalGreedy().prepare(evidence), settings)
    assert scales_of(again) == scales_of(once)


# predicted


def worked(slopes, score, pairs=100):
    """Return ranks of one layer with these mean slopes and t statistics."""
    total = {"sum": pairs * torch.tensor([slopes]).double()}
    t = torch.tensor([score])
    return AURanks("attention", t, t.sign(), total, {"pairs": pairs})


def test_prediction_worked_by_hand():
    # by |t|: slopes .2, -.3, .1 are significant, the last is not; sums .2, .5, .6
    ranks = worked([0.2, 0.1, -0.3, 0.9], [30.0, 10.0, -20.0, 0.1])
    assert predict(ranks, -0.4, 0.05) == pytest.approx((2, 0.8, 0.4))
    assert predict(ranks, -0.05, 0.05) == pytest.approx((1, 0.25, 0.05))
    assert predict(ranks, -0.55, 0.05) == pytest.approx((3, 0.55 / 0.6, 0.55))
    assert predict(ranks, -2.0, 0.05) == pytest.approx((3, 1.0, 0.6))  # not enough, so as far as first order is trusted
    assert predict(worked([0.2, 0.1], [0.3, -0.2]), -0.4, 0.05) == (0, 0, 0)
    assert predict(ranks, 0.0, 0.05) == pytest.approx((1, 0.0, 0.0))  # nothing left to gain


def test_prediction_and_measurement_are_in_the_header(mixed, upstream, tokenizer):
    method = CausalPredicted(q=0.9)
    assert method.grid("full") == [{"q": 0.9}] == method.grid("small")
    plan = method.prepare(mixed)
    assert method.plan(plan, {"q": 0.9}) is plan
    before = sum(log_sigmoid(log_odds(upstream, tokenizer, *pair)) for pair in MIXED) / len(MIXED)
    with hook_steering(upstream, plan):
        after = sum(log_sigmoid(log_odds(upstream, tokenizer, *pair)) for pair in MIXED) / len(MIXED)
    assert plan.header["measured"] == pytest.approx(after - before, rel=1e-3)
    slopes = mixed.ranks("causal").stats["sum"] / len(MIXED)
    gain = sum(abs(float(slopes[au])) for au in scales_of(plan)) * plan.header["alpha"]
    assert plan.header["predicted"] == pytest.approx(gain, rel=1e-5) and gain <= -before * (1 + 1e-6)
    assert 0 < plan.header["alpha"] <= 1 and plan.header["k"] == len(plan)


def test_first_order_holds_for_small_steps(mixed):
    ranks = mixed.ranks("causal")
    plan = Causal().plan(ranks, {"k": 30, "alpha": 2e-3})
    slopes = (ranks.stats["sum"] / len(MIXED)).abs()
    gain = 2e-3 * sum(float(slopes[au]) for au in scales_of(plan))
    assert mean_log_sigmoid(mixed, plan) - mean_log_sigmoid(mixed) == pytest.approx(gain, rel=0.05)


def test_pairs_with_equal_answers_cannot_be_moved(llama, tokenizer):
    pairs = PAIRS[:4]
    some = mean_log_sigmoid(evidence_of(llama, tokenizer, pairs))
    diluted = mean_log_sigmoid(evidence_of(llama, tokenizer, [*pairs, ("Is it?", " yes", " yes")] * 2))
    assert diluted == pytest.approx(some * 4 / 5, rel=1e-6)


def test_nothing_significant_nothing_predicted(evidence, llama):
    plan = CausalPredicted(q=1e-30).prepare(evidence)
    assert len(plan) == 0 and (plan.header["k"], plan.header["predicted"], plan.header["measured"]) == (0, 0, 0)
    with steer(llama, plan):
        pass


# ablations


def test_location_and_direction_are_ablated_apart(evidence):
    published, causal = evidence.ranks("activation"), evidence.ranks("causal")
    actual = {}
    for method in (CausalLocation(), CausalSign()):
        actual[method.name] = scales_of(method.plan(method.prepare(evidence), {"k": 9, "alpha": 2.0}))
    where = by_magnitude(causal.score)[:9]
    assert actual["causal-location"] == {au: 2 * float(published.gain[au]) for au in where}
    where = by_magnitude(published.score)[:9]
    assert actual["causal-sign"] == {au: 2 * math.copysign(1, causal.score[au]) for au in where}
    assert actual["causal-location"].keys() != actual["causal-sign"].keys()


def test_counted_effects_are_the_signs_of_single_pairs(evidence, llama, tokenizer):
    few = evidence_of(llama, tokenizer, [*PAIRS[:5], ("Is it?", " yes", " yes")])
    signs = [
        screen([pair, pair], llama, tokenizer, ["attention"], momentum="causal", progress=False)["attention"].gain
        for pair in few.pairs[:5]
    ]
    ranks = CausalCounted().prepare(few)
    for au in by_magnitude(ranks.score):
        up, down = sum(float(s[au]) > 0 for s in signs), sum(float(s[au]) < 0 for s in signs)
        assert float(ranks.score[au]) == pytest.approx((-down if up < down else up) / 6)  # of all pairs
    plan = CausalCounted().plan(ranks, {"k": 3, "alpha": 2.0})
    assert scales_of(plan) == {au: 2 * float(ranks.score[au]) for au in by_magnitude(ranks.score)[:3]}


def test_fixed_strength_and_fixed_vector(evidence):
    ranks = evidence.ranks("activation")
    where = by_magnitude(ranks.score)[:5]
    fixed = FixedStrength().plan(FixedStrength().prepare(evidence), {"k": 5, "alpha": 1.5})
    assert scales_of(fixed) == {au: 1.5 * math.copysign(1, ranks.score[au]) for au in where}
    plan = FixedVector().plan(FixedVector().prepare(evidence), {"k": 5, "alpha": 1.5})
    difference = torch.sub(*evidence.activations()).mean(0)
    assert {au[1:3] for au in plan.aus()} == set(where) and not plan.scales
    for _, layer, dim, _, shift in plan.aus():
        assert shift == pytest.approx(1.5 * float(difference[layer, dim]), rel=1e-4)


def test_suppression_damps_all_but_the_best(evidence):
    ranks, method = evidence.ranks("activation"), Suppress()
    order = by_magnitude(ranks.score)
    plan = method.plan(ranks, {"share": 0.9995, "factor": 0.25})  # 191 of 192
    assert scales_of(plan) == dict.fromkeys(order[1:], -0.75)  # x -> x / 4
    assert len(method.plan(ranks, {"share": 0.5, "factor": 0.9})) == 96
    assert len(method.plan(ranks, {"share": 0.0001, "factor": 0.9})) == 1
