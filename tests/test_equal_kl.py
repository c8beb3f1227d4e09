"""Methods at the same KL: the scalar that is found, ours and its controls, costs that are kept, tables and commands."""

import json
import math
import random

import pytest
import torch
from conftest import PAIRS
from one_cell import bench_for, computed, embedded_cell, store_in

import main
from austeer.commands import fisher as fisher_command
from austeer.commands import plan as plan_command
from austeer.commands import rank as rank_command
from austeer.errors import AUSteerError, Overflow
from austeer.evidence import Costs, Evidence
from austeer.fisher import Fisher, measure_fisher, predicted_kl
from austeer.kl import KLMeter
from austeer.methods.fisher import KLBudget, RandomAtKL, ShuffledPairs
from austeer.methods.registry import METHODS
from austeer.neutral import NeutralText, from_passages
from austeer.pairs import Pair
from austeer.plan import Plan
from eval.decomposition import UNBIASED, fitted_offset, is_right
from eval.statistics import crossed_bootstrap, crossed_p, mcnemar
from experiments import costs, kl_report, records
from experiments.bench import BENCHES
from experiments.cell import AT_KL
from experiments.equal_kl import PASSES, Unreached, candidates, scaled_to
from experiments.ranking import ranks_of
from experiments.run_cell import RunAtKL, cell_key, run_cell
from MFU_screening import screen
from set_MFU import set_MFU

SITES = ("attention", "neuron")
GROUPS = [str(number // 2) for number in range(len(PAIRS))]


@pytest.fixture(autouse=True)
def fresh_cells():
    BENCHES.close()
    yield
    BENCHES.close()


@pytest.fixture(scope="module")
def neutral() -> NeutralText:
    rng = random.Random(0)
    return from_passages("bytes", [[1, *rng.choices(range(3, 259), k=15)] for _ in range(1400)], 16)


@pytest.fixture(scope="module")
def evidence(llama, tokenizer, neutral) -> Evidence:
    """Evidence of both sites, pooled, with what costs are told by."""
    pairs, fisher = [Pair(*pair) for pair in PAIRS], measure_fisher(llama, SITES, neutral, progress=False)
    ranks = screen(pairs, llama, tokenizer, SITES, momentum="causal-tempered", groups=GROUPS, progress=False)
    meter = KLMeter(llama, fisher.measure)
    offered = Costs(lambda: neutral, lambda sites: fisher.only(sites), lambda: meter)
    return Evidence(llama, tokenizer, pairs, "attention+neuron", lambda momentum, site: ranks[site], 0, offered)


# --- one scalar


class OnAScale:
    """A change of which only the factor is known, and what it costs by a formula."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def times(self, factor):
        return OnAScale(self.factor * factor)


def overflowing(change):
    if change.factor > 0.02:
        raise Overflow("too much")
    return change.factor**2


@pytest.mark.parametrize("start", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize(
    "formula",
    [
        lambda x: 0.3 * x**2,
        lambda x: min(12.0, 0.01 * x**2 + 0.2 * x**6),
        lambda x: 8 * x**2 / (1 + x**2),  # near its largest, more strength costs nothing more
        lambda x: x**1.5,
    ],
)
def test_a_scalar_is_found_in_few_passes(formula, start):
    asked = []

    def meter(change):
        asked.append(change.factor)
        return formula(change.factor)

    found = scaled_to(OnAScale(), 0.01, meter, start)
    assert found.kl == formula(found.factor) == pytest.approx(0.01, rel=0.1)
    assert found.change.factor == found.factor and len(asked) <= PASSES


def test_strength_that_overflows_is_too_much():
    found = scaled_to(OnAScale(), 1e-4, overflowing)
    assert found.factor == pytest.approx(0.01, rel=0.05)

    def wall(change):
        if change.factor > 1.5:
            raise Overflow("too much")
        return change.factor**6

    assert scaled_to(OnAScale(), 4.0, wall, 0.5).kl == pytest.approx(4, rel=0.1)  # the first secant goes far beyond it


def test_what_cannot_be_brought_to_a_kl_says_why():
    with pytest.raises(Unreached, match="it changes nothing"):
        scaled_to(OnAScale(), 0.1, lambda change: 0.0)
    with pytest.raises(Unreached, match=r"the nearest of 6 tries costs 0\.0(2|199)"):
        scaled_to(OnAScale(), 0.1, lambda change: 0.02 * change.factor / (1 + change.factor))
    with pytest.raises(Unreached, match=r"the nearest of 6 tries costs 0\.000"):
        scaled_to(OnAScale(), 0.1, overflowing)

    def never(change):
        raise Overflow("too much")

    with pytest.raises(Unreached, match="it overflowed in 6 tries"):
        scaled_to(OnAScale(), 0.1, never)


def test_the_grid_points_that_are_brought_to_a_kl():
    points = [{"k": k, "alpha": alpha} for k in (4, 16, 100) for alpha in (0.5, 2.0)]
    assert candidates(points) == [{"k": 100, "alpha": 0.5}]
    layers = [{"depth": depth, "alpha": alpha} for alpha in (0.5, 1.0) for depth in (0.25, 0.5, 0.75)]
    assert candidates(layers) == [{"depth": depth, "alpha": 0.5} for depth in (0.25, 0.5, 0.75)]
    multipliers = [{"share": share, "m": m} for share in (0.1, 0.2) for m in (0.75, 1.25, 0.5, 4.0)]
    assert candidates(multipliers) == [{"share": share, "m": m} for share in (0.1, 0.2) for m in (0.75, 1.25)]
    many = [{"rho": rho, "sparsity": sparsity} for rho in range(10) for sparsity in range(6)]
    assert candidates(many) == [{"rho": rho, "sparsity": sparsity} for rho in (2, 7) for sparsity in (1, 4)]
    assert candidates([{"q": 0.05}]) == [{"q": 0.05}]


def test_the_kl_of_text_in_front_is_over_the_same_tokens(llama, neutral):
    texts, front = neutral.part("measure")[:7], [70, 71, 72]
    meter, total = KLMeter(llama, texts), 0.0
    for ids in texts:
        longer = torch.cat([ids[:1], torch.tensor(front), ids[1:]])
        for place in range(8, 16):  # the tokens of the second half
            plain = llama(ids[None, :place]).logits[0, -1].double().log_softmax(-1)
            prompted = llama(longer[None, : place + 3]).logits[0, -1].double().log_softmax(-1)
            total += float((plain.exp() * (plain - prompted)).sum())
    assert meter.of_front(front, 1) == pytest.approx(total / (7 * 8), rel=1e-3)
    assert meter.of_front([], 1) == pytest.approx(0, abs=1e-6)


# --- ours and its controls


def test_fisher_is_the_plan_of_the_budget(llama, evidence):
    method = KLBudget()
    plan = method.plan(method.prepare(evidence), {"kl": 0.01})
    ranks = [evidence.ranks("causal-tempered", site) for site in SITES]
    expected = set_MFU(ranks, kl=0.01, fisher=evidence.costs.fisher(SITES), model=llama)
    assert all(torch.equal(plan.scales[site], expected.scales[site]) for site in SITES)
    assert plan.header["measured_kl"] == pytest.approx(0.01, rel=0.1) and len(plan) == plan.header["k"]


def test_options_of_fisher_reach_the_budget(evidence):
    method = KLBudget(k=9, estimate="bound", z=0.3)
    plan = method.plan(method.prepare(evidence), {"kl": 0.001})
    assert len(plan) == 9 and plan.header["estimate"] == "bound" and plan.header["z"] == 0.3
    with pytest.raises(AUSteerError, match="k must be at least 1, or 0"):
        KLBudget(k=-1)
    with pytest.raises(AUSteerError, match="estimate 'best'"):
        KLBudget(estimate="best")


def test_random_aus_cost_the_same_each_and_together(evidence):
    method = RandomAtKL(k=12)
    prepared = method.prepare(evidence)
    first, second = (method.plan(prepared, {"kl": 0.0005}, draw) for draw in (0, 1))
    assert len(first) == len(second) == 12 and {au[:3] for au in first.aus()} != {au[:3] for au in second.aus()}
    worth, diagonal = [], evidence.costs.fisher(SITES).diagonal
    for site, layer, dim, scale, _ in first.aus():
        damped = float(diagonal[site][layer, dim]) + 0.01 * float(diagonal[site].mean())
        worth.append(scale**2 * damped)
    assert worth == pytest.approx([worth[0]] * 12, rel=1e-3) and first.header["measured_kl"] == pytest.approx(
        0.0005, rel=0.1
    )
    assert {math.copysign(1, au[3]) for au in first.aus()} == {1.0, -1.0}


def test_shuffled_pairs_by_plain_loops(evidence):
    """The bound of effects whose signs, and whose weights, are those of swapped answers."""
    method = ShuffledPairs(k=5, estimate="bound", z=0.0)
    prepared = method.prepare(evidence)
    plan = method.plan(prepared, {"kl": 0.0005}, 3)
    effects, n = prepared.budget.effects, len(PAIRS)
    swapped = torch.randperm(n // 2, generator=torch.Generator().manual_seed(3)) < n // 4
    gates = []
    for au in range(len(prepared.budget.cost)):
        total = 0.0
        for j in range(n):
            sign = -1.0 if swapped[j // 2] else 1.0
            weight = 1 / (1 + math.exp(sign * float(effects.z[j]))) / effects.tau
            total += sign * float(effects.gradients[j, au]) * weight
        gates.append(total / n / float(prepared.budget.cost[au]))
    worth = [gate**2 * float(cost) for gate, cost in zip(gates, prepared.budget.cost, strict=True)]
    best = sorted(range(len(gates)), key=lambda au: -worth[au])[:5]
    flat = torch.cat([plan.scales[site].flatten() for site in SITES])
    assert set(flat.nonzero().flatten().tolist()) == set(best)
    ratios = [float(flat[au]) / gates[au] for au in best]
    assert ratios == pytest.approx([ratios[0]] * 5, rel=1e-3) and ratios[0] > 0


def test_controls_take_more_aus_where_few_cannot_cost_as_much(evidence):
    method, given = RandomAtKL(k=2), KLBudget(k=2)
    prepared = method.prepare(evidence)
    budget = prepared.budget
    two = (budget.random_direction(2, 0), budget.strongest(budget.own_gates, 2))
    kl = 1.5 * max(budget.plan_along(direction, 50.0).header["predicted_kl"] for direction in two)
    plan = method.plan(prepared, {"kl": kl})
    assert len(plan) > 2 and len(plan) & (len(plan) - 1) == 0
    assert plan.header["measured_kl"] == pytest.approx(kl, rel=0.1) and "reached" not in plan.header
    short = given.plan(given.prepare(evidence), {"kl": 10 * kl})
    assert len(short) == 2 and "reached" in short.header, "a k that was asked for is kept"


# --- costs of a bench


def test_fisher_information_is_measured_once_and_kept(tmp_path, monkeypatch):
    task = {"task": "copa", "limit": 5}
    whole = costs.fisher_of(bench_for(tmp_path, **task), SITES)
    files = sorted(tmp_path.rglob("fisher-*/*.safetensors"))
    assert [file.stem for file in files] == sorted(SITES) and whole.sites == list(SITES)
    BENCHES.close()
    monkeypatch.setattr("austeer.fisher._scores", None)  # nothing can be measured now
    again = costs.fisher_of(bench_for(tmp_path, **task), SITES[1:])
    assert torch.equal(again.diagonal["neuron"], whole.diagonal["neuron"])
    bench = bench_for(tmp_path, task="svamp", limit=5)  # another task is another model
    with pytest.raises(TypeError):
        costs.fisher_of(bench, SITES[1:])
    stale = Fisher.load(files[0])
    stale.header["fingerprint"] = "of other weights"
    stale.save(files[0])
    BENCHES.close()
    with pytest.raises(TypeError):
        costs.fisher_of(bench_for(tmp_path, **task), SITES[:1])


def test_draws_of_pairs_share_what_a_model_costs(tmp_path, monkeypatch):
    one, other = (bench_for(tmp_path, task="copa", limit=5, n_pairs=40, pairs_draw=draw) for draw in (0, 1))
    assert one.task.pairs != other.task.pairs and costs.meter_of(one, "measure") is costs.meter_of(other, "measure")
    assert costs.meter_of(bench_for(tmp_path, task="copa", limit=6), "prompts") is not costs.meter_of(one, "prompts")
    one.learned["x"] = other.learned["x"] = 1
    BENCHES.forget_learned(one)
    assert other.learned, "tiny models have room for all"
    monkeypatch.setattr("experiments.bench.TINY", 1)
    BENCHES.forget_learned(one)
    assert one.learned and not other.learned


def test_the_text_that_a_model_writes_itself_is_kept(tmp_path, monkeypatch):
    bench = bench_for(tmp_path, task="copa", limit=5)
    meter = costs.meter_of(bench, "own")
    passages = costs.neutral_of(bench).part("measure")[: costs.CONTINUED]
    written = torch.cat(meter.batches)
    assert written.shape == passages.shape and torch.equal(written[:, :16], passages[:, :16])
    assert not torch.equal(written[:, 16:], passages[:, 16:])
    BENCHES.close()
    monkeypatch.setattr(costs, "sampled", None)
    again = costs.meter_of(bench_for(tmp_path, task="copa", limit=5), "own")
    assert torch.equal(torch.cat(again.batches), written)


def test_neutral_text_of_an_embedded_model_is_of_its_kind(tmp_path):
    bench = bench_for(tmp_path, task="tone", limit=5)
    neutral = costs.neutral_of(bench)
    unknown = bench.tokenizer.unk_token_id
    assert neutral.name == "held-out documents" and not (neutral.passages == unknown).any()
    tested = {item.prompt.strip() for item in bench.task.test}
    text = " ".join(bench.tokenizer.batch_decode(neutral.passages))
    assert not any(prompt in text for prompt in tested)


# --- cells


def at_kl(level, method="causal", site="attention", **flat):
    return embedded_cell(
        **{"task": "copa", "limit": 40, "n_pairs": 60, **flat}, method=method, site=site, search=AT_KL, level=level
    )


def test_keys_of_cells_at_a_kl(tmp_path):
    def key(cell):
        return cell_key(cell, BENCHES.open(cell.model, cell.task, store_in(tmp_path)))

    one, other = key(at_kl(0.01)), key(at_kl(0.03))
    assert {name for name in one if one[name] != other[name]} == {"level"} and one["search"] == AT_KL
    plain = key(embedded_cell(task="copa", limit=40, n_pairs=60, method="causal", site="attention"))
    assert set(one) - set(plain) == {"level", "neutral"}, "cells that need no neutral text do not name it"
    ours = key(embedded_cell(task="copa", limit=40, n_pairs=60, method="fisher", site="attention"))
    assert set(ours) - set(plain) == {"neutral"}


def test_a_method_at_a_kl(tmp_path):
    store = store_in(tmp_path)
    cell = at_kl(0.01)
    record = run_cell(cell, bench := BENCHES.open(cell.model, cell.task, store))
    kl = record["kl"]
    assert kl["measured"] == pytest.approx(0.01, rel=0.1) and kl["asked"] == 0.01 and kl["passes"] <= PASSES + 1
    assert record["settings"] == {"k": 32, "alpha": 0.5} and record["touched"] == 32 and record["asked"] == 0
    ranks = ranks_of(bench, "causal", "attention")
    plan = set_MFU(ranks, 32, 0.5).times(kl["factor"])
    fisher = costs.fisher_of(bench, ["attention"])
    assert kl["predicted"] == pytest.approx(predicted_kl(plan, fisher), rel=1e-4)
    names = {"measure": "measured", "report": "fresh", "prompts": "on_prompts", "own": "on_own"}
    for text, name in names.items():
        assert kl[name] == pytest.approx(costs.meter_of(bench, text)(plan), rel=1e-4)
    assert kl["fresh"] != kl["measured"] and abs(kl["fresh"] - 0.01) < 5 * kl["fresh_error"]


def test_a_shift_at_a_kl_has_no_prediction(tmp_path):
    cell = at_kl(0.01, "caa", "layer")
    kl = run_cell(cell, BENCHES.open(cell.model, cell.task, store_in(tmp_path)))["kl"]
    assert kl["measured"] == pytest.approx(0.01, rel=0.1) and kl["predicted"] is None and "shifts" in kl["unpriced"]


def test_a_layer_is_chosen_on_validation_at_the_same_kl(tmp_path):
    cell = at_kl(0.01, "caa", "layer")
    record = run_cell(cell, bench := BENCHES.open(cell.model, cell.task, store_in(tmp_path)))
    depths = {key: point["depth"] for key, point in zip(record["grid_scores"], record["grid"], strict=True)}
    assert sorted(depths.values()) == [0.25, 0.5, 0.75] and record["asked"] == 3 * 40
    assert record["grid_scores"][record["chosen"]] == max(record["grid_scores"].values())
    run, method = RunAtKL(cell, bench, "x"), METHODS["caa"]
    learned, _ = run.learned(method)
    for key, point in zip(record["grid_scores"], record["grid"], strict=True):
        change, found = run.at_level(method, learned, point)
        assert found["measured"] == pytest.approx(0.01, rel=0.1)
        right = sum(run.ask(bench.task.validation, "validation", change))
        assert record["grid_scores"][key] == right / 40
    chosen = zip(record["grid_scores"], record["grid"], strict=True)
    change, _ = run.at_level(method, learned, next(point for key, point in chosen if key == record["chosen"]))
    tested = run.task.columns(bench.task.test, run.said(bench.task.test, "test", change))
    assert record["outcomes"] == records.pack(tested.outcomes), "what is tested is what was chosen"
    offset = fitted_offset(*run.task.preferences(bench.task.validation, run.said(bench.task.validation, "x", change)))
    unbiased = is_right(*run.task.preferences(bench.task.test, run.said(bench.task.test, "y", change)), offset)
    assert record["columns"][UNBIASED] == records.pack(unbiased), "the constant is fitted under the same plan"


def test_where_nothing_is_left_to_choose_on_the_middle_candidate_is_tested(tmp_path):
    cell = at_kl(0.01, "caa", "layer")
    bench = BENCHES.open(cell.model, cell.task, store_in(tmp_path))
    bench.task.validation = []
    run = RunAtKL(cell, bench, "x")
    assert run.best_of(METHODS["caa"], None, {"a": (), "b": (), "c": ()}) == (
        "b",
        {"chosen_on": "nothing: the middle candidate"},
    )
    assert run.best_of(METHODS["caa"], None, {"a": ()}) == ("a", {})


@pytest.mark.slow
def test_the_controls_share_what_ours_learned_and_not_its_plans(tmp_path):
    store, plans = store_in(tmp_path), {}
    for name in ("fisher", "random-at-kl", "shuffled-pairs"):
        cell = at_kl(0.01, name)
        bench = BENCHES.open(cell.model, cell.task, store)
        run, method = RunAtKL(cell, bench, "x"), METHODS[name]
        learned, _ = run.learned(method)
        plans[name] = method.plan(learned, {"kl": 0.01})
        assert learned is bench.learned["fisher", (), "attention"][0]
        fresh = method.plan(method.prepare(Evidence(
            bench.model, bench.tokenizer, bench.task.pairs, "attention", lambda m, site, bench=bench: ranks_of(bench, m, site), 0,
            costs.costs_of(bench),
        )), {"kl": 0.01})  # fmt: skip
        assert torch.equal(plans[name].scales["attention"], fresh.scales["attention"])
    flat = [plan.scales["attention"] for plan in plans.values()]
    assert not any(torch.equal(a, b) for a, b in ((flat[0], flat[1]), (flat[0], flat[2]), (flat[1], flat[2])))


@pytest.mark.slow
def test_the_old_view_tells_what_ours_costs(tmp_path):
    few = {"task": "copa", "limit": 40, "n_pairs": 60}
    record = computed(tmp_path, **few, method="fisher", site="attention+neuron")
    assert set(record["grid_scores"]) == {"0.003", "0.01", "0.03", "0.1"}
    if record["settings"]:
        assert record["kl"]["measured"] and record["kl"]["predicted"] and record["touched"]


def test_the_comparison_at_equal_kl(tmp_path, capsys, monkeypatch):
    command = ["--data_name", "copa", "--applied_module", "attention+neuron", "--limit", "60", "--draws", "1"]
    command += ["--method", "fisher", "shuffled-pairs", "published", "--at-kl", "0.01", "9", "--device", "cpu"]
    command += ["--results", str(tmp_path), "--path", str(tmp_path / "ranks"), "--jobs", "1"]
    main.main(command)
    output = capsys.readouterr().out
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert sum("| 0.01 |" in line for line in table) == 2 * 4, (
        "published runs at each of the sites; skill is a table of its own"
    )
    assert "accuracy on 60 items of test" in output and "likelier option, offset removed on 60 items of test" in output
    assert any("prompt only" in line for line in table) and "is not brought to 9.0" in output
    (picture,) = tmp_path.glob("*-at-kl.png")
    assert (
        picture.stat().st_size > 20_000
        and "causal, KL budget, Head+Neuron" in (tmp_path / "embedded-copa-at-kl.md").read_text()
    )
    rows = [json.loads(file.read_text()) for file in (tmp_path / "records").glob("*.json")]
    reached = [row for row in rows if row["method"] not in ("vanilla", "prompt-only") and "outcomes" in row]
    assert reached and all(abs(row["kl"]["measured"] / row["kl"]["asked"] - 1) < 0.1 for row in reached)
    (prompted,) = [row for row in rows if row["method"] == "prompt-only" and "kl" in row]
    assert 0 < prompted["kl"]["measured"] < 5

    monkeypatch.setattr("experiments.store.Store.write", None)  # a finished cell must not be computed again
    BENCHES.close()
    main.main(command)
    assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--at-kl", "0"], "positive numbers of nats"),
        (["--at-kl", "nan"], "positive numbers of nats"),
        (["--at-kl", "0.1", "--search", "grid"], "searches no strength"),
        (["--neutral", "prose.txt"], "prose is unknown words to the embedded models"),
    ],
)
def test_wrong_options_of_the_comparison(options, message):
    with pytest.raises(AUSteerError, match=message):
        main.main(["--data_name", "copa", *options])


# --- tables


def made_up(method, outcomes, level=0.01, pairs="p", draw=0, **kl):
    return {"method": method, "site": "ffn", "options": {}, "draw": draw, "pairs_hash": pairs, "n": len(outcomes), "touched": 3,
            "right": sum(outcomes), "outcomes": records.pack(outcomes), "measure": "accuracy", "test_split": "test",
            "kl": {"asked": level, "measured": level, "predicted": level, "text": "prose", **kl}}  # fmt: skip


BASE = [True] * 50 + [False] * 50
VANILLA = {key: value for key, value in made_up("vanilla", BASE).items() if key != "kl"} | {"site": None}


def better(gained, lost=0):
    return [False] * lost + [True] * (50 - lost) + [True] * gained + [False] * (50 - gained)


def test_gain_and_interval_of_one_draw_of_several_and_of_a_control():
    (one,) = kl_report.lines_of([made_up("fisher", better(20, 5))], {})
    value, low, high = kl_report.estimate(one, VANILLA)
    assert value == pytest.approx(15) and 5 < low < 10 and 20 < high < 25
    draws = [made_up("fisher", better(gained), pairs=str(gained)) for gained in (0, 20, 40)]
    (three,) = kl_report.lines_of(draws, {})
    assert kl_report.estimate(three, VANILLA) == pytest.approx(
        crossed_bootstrap(
            [[100.0 * (after - was) for was, after in zip(BASE, better(gained), strict=True)] for gained in (0, 20, 40)]
        )
    )
    alike = [made_up("fisher", better(20, 5), pairs=str(draw)) for draw in range(3)]
    (same,) = kl_report.lines_of(alike, {})
    assert kl_report.estimate(same, VANILLA) == pytest.approx(kl_report.estimate(one, VANILLA), abs=1.5), (
        "draws add nothing"
    )
    control = [made_up("random-at-kl", better(gained), draw=draw) for draw, gained in enumerate((0, 3, 9))]
    (band,) = kl_report.lines_of(control, {})
    assert kl_report.estimate(band, VANILLA) == pytest.approx((4, 0, 9))


def test_ours_is_compared_with_every_line_of_its_level():
    ours, rival = made_up("fisher", better(20)), made_up("published", better(5))
    controls = [made_up("random-at-kl", better(gained), draw=draw) for draw, gained in enumerate((1, 8))]
    apart = made_up("published", better(5), level=0.1)  # there ours has no row
    lines = kl_report.lines_of([ours, rival, *controls, apart], {})
    against = {line.method: p for line in lines if (p := kl_report.compared(lines, VANILLA).get(id(line)))}
    p_rival = mcnemar(better(5), better(20))[2]
    ahead = [a - (b + c) / 2 for a, b, c in zip(better(20), better(1), better(8), strict=True)]
    p_control = crossed_p([ahead])
    assert set(against) == {"published", "random-at-kl"}
    assert against["published"][0] == pytest.approx(p_rival)
    assert against["random-at-kl"][0] == p_control, "the mean of its draws, item by item"
    assert max(against["published"][1], against["random-at-kl"][1]) >= 2 * min(p_rival, p_control) * 0.99
    pairs = [
        ("fisher", 4, "a"),
        ("fisher", 9, "b"),
        ("fisher", 8, "c"),
        ("caa", 2, "a"),
        ("caa", 4, "b"),
        ("caa", 5, "c"),
    ]
    lines = kl_report.lines_of([made_up(method, better(gained), pairs=draw) for method, gained, draw in pairs], {})
    ours, other = lines
    assert {line.method for line in lines} == {"fisher", "caa"}
    ahead = [
        [a - b for a, b in zip(better(gained), better(theirs), strict=True)]
        for gained, theirs in ((4, 2), (9, 4), (8, 5))
    ]
    assert kl_report.p_against(ours, other, VANILLA) == crossed_p(ahead), "draw against the same draw"


def test_draws_that_happen_to_gain_alike_prove_nothing():
    """Two draws with the same gain have no spread between them; their items have."""
    draws = [made_up("fisher", better(6, 4), pairs=draw) for draw in "ab"]
    table = kl_report.table([VANILLA, *draws], {})
    (row,) = [line for line in table.splitlines() if line.startswith("| 0.01 |")]
    changes = [after - was for was, after in zip(BASE, better(6, 4), strict=True)]
    p = crossed_p([changes, changes])
    assert f"| {p:.1g} |" in row and "| 0 |" not in row


def test_a_row_without_strength_is_compared_at_the_nearest_kl():
    ours = [made_up("fisher", better(gained), level=level) for gained, level in ((20, 0.01), (30, 0.1))]
    prompts = made_up("few-shot", better(10))
    prompts["kl"] = {"measured": 0.07, "text": "prose"}
    lines = kl_report.lines_of([*ours, prompts], {})
    (line,) = [line for line in lines if line.method == "few-shot"]
    assert kl_report.compared(lines, VANILLA)[id(line)][0] == pytest.approx(mcnemar(better(10), better(30))[2])


def test_a_level_that_is_not_reached_is_a_dash_with_its_reason():
    lost = made_up("causal", better(0), level=0.1)
    del lost["outcomes"], lost["kl"]["measured"]
    lost["kl"]["unreached"] = "it changes nothing"
    table = kl_report.table([VANILLA, made_up("fisher", better(9)), lost], {})
    (line,) = [line for line in table.splitlines() if line.startswith("| 0.1 |")]
    assert line.count("–") >= 7 and "- causal, FFN is not brought to 0.1: it changes nothing" in table
    assert kl_report.curves([VANILLA, lost], {}) == {}
    tested = made_up("caa", better(9), level=0.1, refused={"0.25,0.5": "it overflowed in 6 tries"})
    assert "caa, FFN at 0.1: not all candidates were brought to it: 0.25,0.5: it overflowed" in kl_report.table(
        [VANILLA, tested], {}
    )
    some = kl_report.table([VANILLA, lost, made_up("causal", better(9), level=0.1, draw=1)], {})
    (line,) = [line for line in some.splitlines() if line.startswith("| 0.1 |")]
    assert "1 of 2 draws" in line and "+9.0" in line and "it changes nothing" in some


# --- commands


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """Ranks of two sites, and the Fisher information of both, made by the commands."""
    folder = tmp_path_factory.mktemp("commands")
    lines = [json.dumps(dict(zip(("prompt", "positive", "negative"), pair, strict=True))) for pair in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    model = ["--model", str(checkpoints["llama"]), "--device", "cpu", "--dtype", "float32"]
    rank = [
        "--pairs",
        str(folder / "pairs.jsonl"),
        "--site",
        *SITES,
        "--momentum",
        "causal",
        "--out",
        str(folder / "ranks"),
    ]
    rank_command.main([*model, *rank])
    fisher_command.main([*model, "--site", "attention", "--out", str(folder / "fisher.safetensors")])
    return folder, model


def test_the_fisher_command_adds_sites_and_skips_those_it_has(files, capsys, monkeypatch):
    folder, model = files
    file = folder / "fisher.safetensors"
    before = Fisher.load(file)
    fisher_command.main([*model, "--site", *SITES, "--out", str(file)])
    after = Fisher.load(file)
    assert after.sites == list(SITES) and torch.equal(after.diagonal["attention"], before.diagonal["attention"])
    assert set(after.header["relative_error"]) == set(SITES)
    monkeypatch.setattr(fisher_command, "measure_fisher", None)
    fisher_command.main([*model, "--site", "neuron", "--out", str(file)])
    assert "it was there already" in capsys.readouterr().out
    other = Fisher.load(file)
    other.header["fingerprint"] = "of other weights"
    other.save(folder / "other.safetensors")
    with pytest.raises(AUSteerError, match=r"exists and differs in fingerprint"):
        fisher_command.main([*model, "--site", "neuron", "--out", str(folder / "other.safetensors")])
    (folder / "short.txt").write_text("a few words")
    with pytest.raises(AUSteerError, match=r"short.txt is too short"):
        fisher_command.main([*model, "--out", str(folder / "new.safetensors"), "--neutral", str(folder / "short.txt")])


def test_the_plan_command_with_a_budget(files, capsys):
    folder, model = files
    fisher_command.main([*model, "--site", *SITES, "--out", str(folder / "fisher.safetensors")])
    budget = ["--fisher", str(folder / "fisher.safetensors"), "--kl", "0.003"]
    both = ["--ranks", *(str(folder / "ranks" / f"{site}.safetensors") for site in SITES)]
    out = folder / "plan.safetensors"
    plan_command.main([*both, *budget, *model, "--out", str(out)])
    text, plan = capsys.readouterr().out, Plan.load(out)
    assert plan.sites == list(SITES) and plan.header["measured_kl"] == pytest.approx(0.003, rel=0.1)
    assert (
        "0.003 allowed, predicted 0.00" in text
        and "measured 0.00" in text
        and "on other text 0.00" in text
        and "predicted for pairs" in text
    )
    plan_command.main(["--ranks", str(folder / "ranks"), "--site", *SITES, *budget, "--k", "20"])
    text = capsys.readouterr().out
    assert "20 atomic units" in text and "not measured: give --model" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kl", "0"], "the budget must be a positive number"),
        (["--kl", "-1"], "the budget must be a positive number"),
        (["--kl", "nan"], "the budget must be a positive number"),
        (["--kl", "500", "--k", "3"], r"a budget of 500 is more than 3 gates of up to 1 cost: .* give a smaller --kl"),
        (["--kl", "0.1", "--alpha", "1"], "needs --fisher .*, and no --alpha"),
        (["--kl", "0.1", "--strength", "fixed"], "leave out --strength"),
        (["--kl", "0.1", "--estimate", "bound", "--z", "1000"], "no effect is larger than its error"),
    ],
)
def test_wrong_budgets_of_the_command(files, options, message):
    folder, _ = files
    given = ["--ranks", str(folder / "ranks" / "attention.safetensors"), "--fisher", str(folder / "fisher.safetensors")]
    with pytest.raises(AUSteerError, match=message):
        plan_command.main([*given, *options])


def test_fisher_information_of_other_weights_is_refused(files):
    folder, _ = files
    other = Fisher.load(folder / "fisher.safetensors")
    other.header["fingerprint"] = "of other weights"
    other.save(folder / "foreign.safetensors")
    given = [
        "--ranks",
        str(folder / "ranks" / "attention.safetensors"),
        "--fisher",
        str(folder / "foreign.safetensors"),
    ]
    with pytest.raises(AUSteerError, match="that of other weights"):
        plan_command.main([*given, "--kl", "0.01"])
    with pytest.raises(AUSteerError, match="is a folder: name the sites"):
        plan_command.main(["--ranks", str(folder / "ranks"), "--k", "3", "--alpha", "1"])
    both = [str(folder / "ranks" / f"{site}.safetensors") for site in SITES]
    with pytest.raises(AUSteerError, match="several sites share a budget"):
        plan_command.main(["--ranks", *both, "--k", "3", "--alpha", "1"])
