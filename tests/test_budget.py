"""Plans of a stated cost: Fisher information, effects and choice against plain loops, and the KL that is measured."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import PAIRS

from austeer.budget import Budget
from austeer.commands import rank as rank_command
from austeer.errors import AUSteerError
from austeer.fisher import Fisher, measure_fisher, predicted_kl, why_unpriced
from austeer.kl import KLMeter
from austeer.neutral import TOKENS, NeutralText, from_passages, neutral_text
from austeer.pair_effects import PairEffects
from austeer.pairs import Pair, write_pairs
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from embedded import acceptance
from MFU_screening import MFU_screening, screen
from rmodels import gates, load_tokenizer, site_shape
from set_MFU import set_MFU

SITES = ("attention", "neuron")
GROUPS = [str(number // 2) for number in range(len(PAIRS))]


@pytest.fixture(scope="module")
def neutral() -> NeutralText:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (1400, 16), generator=generator)
    rows[:, 0] = 1
    return from_passages("bytes", rows.tolist(), 16)


@pytest.fixture(scope="module")
def fisher(llama, neutral) -> Fisher:
    return measure_fisher(llama, SITES, neutral, progress=False)


@pytest.fixture(scope="module")
def ranks(llama, tokenizer):
    by_site = screen(PAIRS, llama, tokenizer, SITES, momentum="causal-tempered", groups=GROUPS, progress=False)
    return [by_site[site] for site in SITES]


def one_gate(model, site: str, layer: int, dim: int, value: float) -> Plan:
    scale = torch.zeros(site_shape(model, site))
    scale[layer, dim] = value
    return Plan({site: scale})


def second_half(model, ids):
    half = ids.shape[1] // 2
    return model(ids).logits[:, half - 1 : -1].double().log_softmax(-1)


# --- temperature in the ranks


def test_ranks_of_fitted_temperature_hold_the_derivatives_of_the_objective(llama, tokenizer, ranks):
    """c of one AU, by finite differences of the steered log-odds."""
    attention = ranks[0]
    effects = PairEffects.of([attention])
    flat = 1 * attention.score.shape[1] + 5
    step, values = 1e-3, []
    for sign in (1, -1):
        with steer(llama, one_gate(llama, "attention", 1, 5, sign * step)):
            again = screen(PAIRS, llama, tokenizer, ["attention"], momentum="causal-tempered", progress=False)
        values.append(again["attention"].stats["log_odds"])
    slope = torch.sigmoid(-effects.z) / effects.tau
    expected = (values[0] - values[1]) / (2 * step) * slope
    c = effects.gradients[:, flat].double() * slope
    torch.testing.assert_close(c, expected, rtol=2e-2, atol=1e-4)
    t = c.mean() / (c.std() / len(c) ** 0.5)
    assert float(attention.score.flatten()[flat]) == pytest.approx(float(t), rel=1e-4)


def test_groups_are_the_units_of_an_error(ranks):
    effects = PairEffects.of(ranks[:1])
    mean, error = effects.mean_and_error()
    c = effects.gradients[:, 70].double() * effects.slope
    n, groups = len(c), sorted(set(effects.groups.tolist()))
    sums = [sum(float(c[j] - c.mean()) for j in range(n) if effects.groups[j] == group) for group in groups]
    expected = math.sqrt(sum(value**2 for value in sums) * len(groups) / (len(groups) - 1)) / n
    assert float(mean[70]) == pytest.approx(float(c.mean())) and float(error[70]) == pytest.approx(expected)


def test_temperature_one_is_what_it_was(llama, tokenizer):
    old = screen(PAIRS, llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"]
    new = MFU_screening(PAIRS, llama, tokenizer, momentum="causal", temperature=1, progress=False)
    assert torch.equal(old.score, new.score) and old.header == new.header and "tau" not in new.header
    fitted = MFU_screening(PAIRS, llama, tokenizer, momentum="causal", progress=False)
    assert fitted.header["momentum"] == "causal-tempered" and "tau_by" in fitted.header
    # a tau of nearly 1 goes the other way through the code, and must agree
    near = MFU_screening(PAIRS, llama, tokenizer, momentum="causal", temperature=1 + 1e-9, progress=False)
    torch.testing.assert_close(near.score, old.score, rtol=1e-3, atol=1e-3)


def test_ranks_keep_their_pairs_in_a_file(ranks, tmp_path):
    ranks[1].save(tmp_path / "ranks.safetensors")
    again = AURanks.load(tmp_path / "ranks.safetensors")
    assert torch.equal(PairEffects.of([again]).gradients, PairEffects.of([ranks[1]]).gradients)


def test_untempered_ranks_cannot_be_given_a_budget(llama, tokenizer, fisher):
    old = screen(PAIRS, llama, tokenizer, ["attention"], momentum="causal", progress=False)["attention"]
    with pytest.raises(AUSteerError, match="needs the gradient of every pair"):
        set_MFU(old, kl=0.01, fisher=fisher)


# --- Fisher information and KL


def test_the_diagonal_is_the_mean_square_of_scores(llama, neutral, fisher):
    """One AU, by finite differences of the log-probability of the same draws."""
    ids, step, squares = neutral.part("choose")[:12], 1e-2, []
    one = measure_fisher(llama, ["attention"], _only(neutral, 12), progress=False)
    for number, row in enumerate(ids):
        before = second_half(llama, row[None])[0]
        generator = torch.Generator().manual_seed(number)
        drawn = torch.multinomial(before.float().exp(), 1, True, generator=generator)[:, 0]
        sums = []
        for sign in (1, -1):
            with steer(llama, one_gate(llama, "attention", 2, 7, sign * step)):
                sums.append(float(second_half(llama, row[None])[0][range(len(drawn)), drawn].sum()))
        squares.append(((sums[0] - sums[1]) / (2 * step)) ** 2)
    assert float(one.diagonal["attention"][2, 7]) == pytest.approx(sum(squares) / len(ids) / 8, rel=0.03)
    assert one.header["tokens"] == 12 * 8


def _only(neutral: NeutralText, n: int):
    """Neutral text whose part to choose by has n passages."""

    class Few(NeutralText):
        def part(self, name):
            return super().part(name)[:n]

    return Few(neutral.name, neutral.passages)


def test_the_fisher_information_does_not_depend_on_batches(llama, neutral, monkeypatch):
    few = _only(neutral, 6)
    whole = measure_fisher(llama, ["neuron"], few, progress=False)
    monkeypatch.setattr("austeer.fisher.TOKENS_AT_ONCE", {"cpu": 16})
    single = measure_fisher(llama, ["neuron"], few, progress=False)
    torch.testing.assert_close(whole.diagonal["neuron"], single.diagonal["neuron"], rtol=1e-3, atol=1e-6)
    close = torch.isclose(whole.scores["neuron"].float(), single.scores["neuron"].float(), rtol=0.02, atol=1e-3)
    assert close.float().mean() > 0.999


def test_kl_is_measured_over_the_second_half(llama, neutral):
    plan = one_gate(llama, "neuron", 1, 3, 0.7)
    ids = neutral.part("measure")[:5]
    before = second_half(llama, ids)
    with steer(llama, plan):
        after = second_half(llama, ids)
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert KLMeter(llama, ids)(plan) == pytest.approx(expected, rel=1e-3)
    lengths = [ids[0], ids[1][:10], ids[2]]  # of several lengths, in any batch
    assert KLMeter(llama, lengths)(plan) == pytest.approx(
        sum(KLMeter(llama, [text])(plan) * (len(text) // 2) for text in lengths) / sum(len(t) // 2 for t in lengths),
        rel=1e-4,
    )


def test_a_plan_that_steers_answers_only_costs_something(llama, neutral):
    plan = one_gate(llama, "attention", 1, 3, 5.0)
    plan.tokens = "generated"
    whole = one_gate(llama, "attention", 1, 3, 5.0)
    meter = KLMeter(llama, neutral.part("measure")[:5])
    assert 0 < meter(plan) != meter(whole)


def test_a_plan_that_reaches_nothing_is_a_mistake(llama, neutral, monkeypatch):
    monkeypatch.setattr("austeer.kl.applied", lambda *args, **kwargs: steer(llama, Plan({})))
    with pytest.raises(AUSteerError, match="the KL is exactly 0"):
        KLMeter(llama, neutral.part("measure")[:2])(one_gate(llama, "neuron", 0, 0, 1.0))


def test_small_plans_cost_what_is_predicted(llama, neutral, fisher):
    generator, meter = torch.Generator().manual_seed(1), KLMeter(llama, neutral.part("measure"))
    for count in (1, 40):
        scale = torch.zeros(site_shape(llama, "neuron"))
        chosen = torch.randperm(scale.numel(), generator=generator)[:count]
        scale.view(-1)[chosen] = torch.randn(count, generator=generator)
        plan = Plan({"neuron": scale})
        plan = plan.times(math.sqrt(0.001 / predicted_kl(plan, fisher)))
        assert predicted_kl(plan, fisher) == pytest.approx(0.001)
        assert 1 / 1.5 < meter(plan) / 0.001 < 1.5


def test_a_price_and_its_error_by_plain_loops(llama, neutral, fisher):
    plan = one_gate(llama, "neuron", 1, 3, 0.5) + one_gate(llama, "attention", 0, 2, -0.4)
    by_passage, draws = [], fisher.header["draws"]
    for passage in range(len(neutral.part("price"))):
        squares = 0.0
        for draw in range(draws):
            scores = {site: fisher.scores[site][passage * draws + draw] for site in SITES}
            along = 0.5 * float(scores["neuron"][1, 3]) - 0.4 * float(scores["attention"][0, 2])
            squares += along**2 / draws
        by_passage.append(squares / 2 / 8)
    n, mean = len(by_passage), sum(by_passage) / len(by_passage)
    error = math.sqrt(sum((value - mean) ** 2 for value in by_passage) / (n - 1) / n)
    products = sum(fisher.scores[s].flatten(1).double() @ plan.scales[s].flatten().double() for s in SITES)
    assert fisher.price_with_error(products) == pytest.approx((mean, error), rel=1e-4)
    assert predicted_kl(plan, fisher) == pytest.approx(mean, rel=1e-4)


def test_the_error_of_a_measured_kl_is_that_over_texts(llama, neutral):
    plan, texts = one_gate(llama, "neuron", 1, 3, 0.7), neutral.part("report")[:9]
    each = [KLMeter(llama, [text])(plan) for text in texts]
    mean = sum(each) / 9
    error = math.sqrt(sum((value - mean) ** 2 for value in each) / 8 / 9)
    assert KLMeter(llama, texts).with_error(plan) == pytest.approx((mean, error), rel=1e-3)


def test_what_cannot_be_priced_says_why(llama, fisher):
    gate = one_gate(llama, "neuron", 0, 0, 1.0)
    assert why_unpriced(gate, fisher) is None
    assert "shifts" in why_unpriced(Plan({}, gate.scales), fisher)
    assert "tokens 'last'" in why_unpriced(Plan(gate.scales, tokens="last"), fisher)
    assert "site ffn" in why_unpriced(one_gate(llama, "ffn", 0, 0, 1.0), fisher)
    assert "other weights" in why_unpriced(Plan(gate.scales, header={"fingerprint": "another"}), fisher)
    with pytest.raises(AUSteerError, match="cannot be predicted"):
        predicted_kl(Plan({}, gate.scales), fisher)


def test_fisher_information_comes_back_from_its_file(fisher, tmp_path):
    fisher.save(tmp_path / "fisher.safetensors")
    again = Fisher.load(tmp_path / "fisher.safetensors")
    assert again.header == fisher.header
    assert torch.equal(again.measure, fisher.measure) and torch.equal(again.report, fisher.report)
    for site in SITES:
        assert torch.equal(again.diagonal[site], fisher.diagonal[site])
        assert torch.equal(again.scores[site], fisher.scores[site])


def test_neutral_text_must_be_long_enough(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("A few words are not enough. " * 20)
    with pytest.raises(AUSteerError, match=r"short.txt is too short: it gives \d+ passages of 64 tokens, and 344 are"):
        neutral_text(tokenizer, tmp_path / "short.txt")


def test_text_that_a_tokenizer_cannot_read_is_refused():
    tokenizer = load_tokenizer(acceptance.WEIGHTS / "copa")
    with pytest.raises(
        AUSteerError, match=r"\d+ of \d+ tokens of the project's prose are unknown to this model's tokenizer"
    ):
        neutral_text(tokenizer)


def test_the_parts_of_neutral_text_share_no_passage(neutral):
    parts = [{tuple(row) for row in neutral.part(name).tolist()} for name in TOKENS]
    assert len(parts) == 4 and len(set.union(*parts)) == sum(map(len, parts))


# --- the plan


def plain_bound(effects: PairEffects, cost, z: float) -> list[float]:
    gates, n, groups = [], len(effects), effects.groups.tolist()
    number = len(set(groups))
    for au in range(len(cost)):
        c = [float(effects.gradients[j, au]) * float(effects.slope[j]) for j in range(n)]
        mean = sum(c) / n
        sums = [0.0] * number
        for group, value in zip(groups, c, strict=True):
            sums[group] += value - mean
        error = math.sqrt(sum(value**2 for value in sums) * number / (number - 1)) / n
        gates.append(math.copysign(max(abs(mean) - z * error, 0.0), mean) / float(cost[au]))
    return gates


def test_the_bound_by_plain_loops(ranks, fisher):
    budget = Budget(ranks, fisher, estimate="bound", z=0.5)
    expected = plain_bound(budget.effects, budget.cost, 0.5)
    direction = budget.strongest(budget.own_gates, 10)
    worth = [gate * gate * float(cost) for gate, cost in zip(expected, budget.cost, strict=True)]
    order = sorted(range(len(worth)), key=lambda au: -worth[au])[:10]
    assert direction.aus.tolist() == order
    for au, gate in zip(direction.aus.tolist(), direction.gates.tolist(), strict=True):
        assert gate == pytest.approx(expected[au], rel=1e-4)


def test_the_discriminant_solves_its_equation(ranks, fisher):
    budget = Budget(ranks[:1], fisher, ridge=2.0)
    effects, n = budget.effects, len(budget.effects)
    x = effects.gradients.double() * effects.slope[:, None] / budget.cost.sqrt()
    mean, centred = x.mean(0), x - x.mean(0)
    covariance = centred.T @ centred / (n - 1)
    trace = float(covariance.trace()) / n
    w = torch.linalg.solve(covariance + 2.0 * trace * torch.eye(len(mean), dtype=torch.float64), mean)
    direction = budget.strongest(budget.own_gates, 12)
    torch.testing.assert_close(direction.gates, (w / budget.cost.sqrt())[direction.aus], rtol=1e-3, atol=1e-6)
    assert set(direction.aus.tolist()) == set(w.abs().topk(12).indices.tolist())


@pytest.mark.parametrize("estimate", ["bound", "discriminant"])
def test_the_budget_is_what_is_measured(llama, ranks, fisher, estimate):
    meter = KLMeter(llama, fisher.measure)
    plan = set_MFU(ranks, kl=0.004, fisher=fisher, estimate=estimate, z=0.2)
    assert predicted_kl(plan, fisher) == pytest.approx(0.004, rel=1e-3) == plan.header["predicted_kl"]
    assert plan.header["measured_kl"] is None and 1 / 1.6 < meter(plan) / 0.004 < 1.6
    corrected = set_MFU(ranks, kl=0.004, fisher=fisher, model=llama, estimate=estimate, z=0.2)
    assert meter(corrected) == pytest.approx(0.004, rel=0.1)
    assert corrected.header["measured_kl"] == pytest.approx(meter(corrected), rel=1e-4)
    assert set(corrected.sites) == set(SITES) and corrected.header["site"] == "attention+neuron"
    assert len(corrected) == corrected.header["k"]


def test_few_forwards_are_spent(llama, ranks, fisher):
    meter = KLMeter(llama, fisher.measure)
    Budget(ranks, fisher).plan(0.05, meter=meter)
    assert meter.passes <= 8


def test_gates_stay_within_their_limit_and_a_large_budget_says_what_it_reached(llama, ranks, fisher):
    plan = set_MFU(ranks, 5, kl=50.0, fisher=fisher, model=llama)
    gates_of_plan = torch.cat([values[values != 0] for values in plan.scales.values()]).abs()
    assert torch.all(gates_of_plan == 1) and plan.header["clipped"] == 5
    assert plan.header["measured_kl"] < 50 and "a budget of 50" in plan.header["reached"]
    wide = set_MFU(ranks, 5, kl=0.05, fisher=fisher, limit=3.0)
    assert max(float(values.abs().max()) for values in wide.scales.values()) > 1


def test_folds_keep_groups_together(ranks):
    effects = PairEffects.of(ranks)
    folds = effects.folds()
    assert torch.stack(folds).sum(0).eq(1).all()
    for fold in folds:
        for group in range(int(effects.groups.max()) + 1):
            assert len(set(fold[effects.groups == group].tolist())) == 1


def test_the_predicted_gain_is_that_of_pairs_a_plan_has_not_seen(ranks, fisher):
    """By plain loops, and far below what the same pairs promise."""
    budget = Budget(ranks, fisher, estimate="bound", z=0.0)
    mean, low, high = budget.cross_fitted(0.01, 30)
    gains = [None] * len(PAIRS)
    for fold in budget.effects.folds():
        rest = budget.effects.only(~fold)
        gates_, _ = budget._priced(direction := budget.strongest(budget.gates(rest), 30), 0.01)
        for j in fold.nonzero().flatten().tolist():
            change = sum(
                float(budget.effects.gradients[j, au]) * float(gate)
                for au, gate in zip(direction.aus, gates_, strict=True)
            )
            z = float(budget.effects.z[j])
            gains[j] = math.log1p(math.exp(-z)) - math.log1p(math.exp(-z - change / budget.effects.tau))
    assert mean == pytest.approx(sum(gains) / len(gains), rel=1e-4) and low < mean < high
    direction = budget.strongest(budget.own_gates, 30)
    promised = budget.effects.gains(direction.aus, budget._priced(direction, 0.01)[0]).mean()
    assert mean < float(promised)


def test_swapped_answers_change_sign_by_group_and_keep_tau(ranks):
    effects = PairEffects.of(ranks)
    swapped = effects.with_answers_swapped(3)
    signs = (swapped.z / effects.z).round()
    assert swapped.tau == effects.tau
    swapped_groups = {int(group) for group, sign in zip(effects.groups, signs, strict=True) if sign < 0}
    assert len(swapped_groups) == (int(effects.groups.max()) + 1) // 2
    torch.testing.assert_close(swapped.gradients, effects.gradients * signs[:, None].float())
    for group in range(int(effects.groups.max()) + 1):
        assert len(set(signs[effects.groups == group].tolist())) == 1


def test_pairs_that_promise_nothing_are_not_steered_by_everything(ranks, fisher):
    """Where plans gain nothing on other pairs, the k that loses least is taken, and not the largest."""
    budget = Budget(ranks, fisher, estimate="bound", z=0.0)
    noise = torch.randn(budget.effects.gradients.shape, generator=torch.Generator().manual_seed(0))
    budget.effects = replace(budget.effects, gradients=noise)
    k = budget.best_k(0.01)
    gains = {other: float(budget._cross_fitted(0.01, [other])[other].mean()) for other in (k, len(budget.cost))}
    assert gains[k] == max(gains.values())


def test_flagged_aus_get_no_gate(ranks, fisher):
    plan = set_MFU(ranks, 40, kl=0.01, fisher=fisher)
    worst = plan.scales["neuron"].abs() == plan.scales["neuron"].abs().max()
    flagged = [ranks[0], replace(ranks[1], stats=ranks[1].stats | {"lies": worst})]
    without = set_MFU(flagged, 40, kl=0.01, fisher=fisher)
    assert not without.scales["neuron"][worst].any() and without.header["left_out"] == int(worst.sum()) > 0
    drawn = Budget(flagged, fisher).random_direction(len(without) * 3, 0).aus
    assert not (~Budget(flagged, fisher).usable)[drawn].any()
    assert len(without) == 40 and predicted_kl(without, fisher) == pytest.approx(0.01, rel=1e-3)
    assert "left_out" not in plan.header


@pytest.mark.parametrize("kl", [0, -1.0, float("nan"), float("inf"), True])
def test_a_wrong_budget_is_refused(ranks, fisher, kl):
    with pytest.raises(AUSteerError, match="the budget must be a positive number of nats"):
        set_MFU(ranks, kl=kl, fisher=fisher)


def test_mistakes_in_the_call_are_named(llama, ranks, fisher):
    with pytest.raises(AUSteerError, match="a budget needs kl and fisher, and no alpha"):
        set_MFU(ranks, 3, 1.0, kl=0.1, fisher=fisher)
    with pytest.raises(AUSteerError, match="leave out location, strength and tokens"):
        set_MFU(ranks, kl=0.1, fisher=fisher, tokens="last")
    with pytest.raises(AUSteerError, match="only a budget has such options"):
        set_MFU(ranks[0], 3, 1.0, estimate="bound")
    with pytest.raises(AUSteerError, match=r"estimate 'best' is unknown|unknown estimate"):
        set_MFU(ranks, kl=0.1, fisher=fisher, estimate="best")
    with pytest.raises(AUSteerError, match="of different sites"):
        set_MFU([ranks[0], ranks[0]], kl=0.1, fisher=fisher)
    other = replace(fisher, header=fisher.header | {"fingerprint": "another"})
    with pytest.raises(AUSteerError, match="other weights"):
        set_MFU(ranks, kl=0.1, fisher=other)
    assert all(gate.idle for gate in gates(llama))


def test_a_file_of_pairs_may_name_their_groups(checkpoints, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", [Pair(*pair) for pair in PAIRS], GROUPS)
    command = ["--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "pairs.jsonl"), "--momentum", "causal"]
    command += ["--site", "neuron", "--out", str(tmp_path / "ranks"), "--quick-proof"]
    rank_command.main([*command, "--group-field", "group"])
    ranks = AURanks.load(tmp_path / "ranks" / "neuron.safetensors")
    assert ranks.stats["groups"].tolist() == [number // 2 for number in range(len(PAIRS))]
    with pytest.raises(AUSteerError, match="tribe is missing"):
        rank_command.main([*command, "--group-field", "tribe", "--force"])
