"""True changes of single AUs from their layer on, the objective's slopes and curvature, and the command truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, PAIRS
from scipy.stats import spearmanr
from tiny_families import IDS, save_family
from torch.nn.attention import SDPBackend

import austeer.objective
import main
import rmodels
from austeer.commands import rank as rank_command
from austeer.errors import AUSteerError
from austeer.first_order import Check, check_first_order, first_order_lies, strongest, without_lies
from austeer.from_layer import keeping_before, repeated, starting_at
from austeer.integrated import integrated_gradients
from austeer.objective import Objective, gates_of, no_gates
from austeer.pairs import Pair, write_pairs
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.temperature import Temperature
from austeer.truth import log_odds_of_changes
from MFU_screening import screen
from paper import measure_truth
from set_MFU import set_MFU

SOME = [Pair(*pair) for pair in PAIRS[:5]]
SHARES_KEYS = "gemma3n_text"  # its later layers read the keys and values of earlier ones
STRUCTURAL = ["gpt2", "opt", "bloom", "phi3", "mixtral", "mamba2", "qwen3_next", "gemma3_text", SHARES_KEYS]


@pytest.fixture(scope="module")
def load(checkpoints, tmp_path_factory):
    models = {}

    def load(family):
        if family not in models:
            folder = checkpoints.get(family) or save_family(tmp_path_factory.mktemp("truth") / family, family)
            models[family] = rmodels.load(folder, dtype="float32", device="cpu")
        return models[family]

    return load


def gate(model, site, *aus):
    gates = no_gates(model, [site])
    for layer, dim, value in aus:
        gates[site][layer, dim] = value
    return gates


# forwards that begin at a layer


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *STRUCTURAL[:-1]])
def test_a_run_from_a_layer_on_is_a_whole_run(load, family):
    model = load(family)
    ids = torch.cat([IDS, IDS.flip(1)])
    whole, others = (model(rows, use_cache=False).logits for rows in (ids, ids + 1))
    layers = rmodels.decoder_layers(model)
    for number in range(len(layers)):
        with keeping_before(model, number) as kept:
            model(ids, use_cache=False)
        runs, hooks = [], []
        for layer in layers:
            inside = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "nf"))
            hooks.append(inside.register_forward_hook(lambda *_, runs=runs, layer=layer: runs.append(layer)))
        with starting_at(model, number, kept[0] if kept else None):
            again = model(ids, use_cache=False).logits
        with starting_at(model, number, repeated(kept[0], 2) if kept else None):
            twice = model(ids.repeat(2, 1), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        assert torch.equal(again, whole)
        torch.testing.assert_close(twice, whole.repeat(2, 1, 1), rtol=1e-5, atol=1e-5)
        assert layers[number] in runs and not any(layer in runs for layer in layers[:number]), "nothing runs before it"
    assert torch.equal(model(ids + 1, use_cache=False).logits, others), "nothing stays behind"


@pytest.mark.parametrize("family", [*FAMILIES, *STRUCTURAL])
def test_changes_are_those_of_whole_forwards(load, tokenizer, family):
    model = load(family)
    objective = Objective(model, tokenizer, SOME, Temperature(3.0))
    nothing = {}
    for site in rmodels.sites(model):
        layers, _ = rmodels.site_shape(model, site)
        for layer in {0, layers - 1} if family in FAMILIES else {layers - 1}:
            width = [one.width for one in rmodels.gates(model, site)][layer]
            changes = [(1, 0.5), (width - 2, -3.0), (1, 2.0)] if width else []
            before, after = log_odds_of_changes(objective, site, layer, changes)
            nothing = objective.log_odds(no_gates(model, [site]))
            torch.testing.assert_close(before, nothing, rtol=1e-4, atol=1e-4)
            for (dim, dose), row in zip(changes, after, strict=True):
                expected = objective.log_odds(gate(model, site, (layer, dim, dose)))
                torch.testing.assert_close(row - before, expected - nothing, rtol=1e-3, atol=1e-4)
    assert float((after - before).abs().max()) > 1e-3, "something was steered"


def test_where_later_layers_read_earlier_ones_whole_forwards_are_run(load, tokenizer):
    model = load(SHARES_KEYS)
    with keeping_before(model, 3) as kept, torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    try:
        with starting_at(model, 3, kept[0]), torch.no_grad():
            differs = not torch.allclose(model(IDS, use_cache=False).logits, whole, atol=1e-3)
    except KeyError:
        differs = True
    assert differs, "this family shows nothing"


def test_a_run_from_a_layer_on_is_compared_with_a_whole_one_first(load, tokenizer):
    model = load("llama")
    batch = Objective(model, tokenizer, SOME[:1], None).encoded
    with keeping_before(model, 2) as kept:
        whole = austeer.truth._log_odds(model, batch, "ffn", 2, [(0, 0.0)], {}, 0, None)[0]
    assert austeer.truth._starts(model, batch, "ffn", 2, kept[0], {}, whole)
    assert not austeer.truth._starts(model, batch, "ffn", 2, kept[0] * 1.1, {}, whole)


def test_many_changes_are_run_in_bounded_batches(load, tokenizer, monkeypatch):
    model = load("llama")
    objective, changes = Objective(model, tokenizer, SOME, Temperature(3.0)), [(dim, 1.0) for dim in range(9)]
    _, together = log_odds_of_changes(objective, "neuron", 1, changes)
    monkeypatch.setitem(austeer.truth.TOKENS_AT_ONCE, "cpu", 300)
    rows, plain = [], austeer.truth.PairTexts
    monkeypatch.setattr(austeer.truth, "PairTexts", lambda model, batch, **k: rows.append(len(batch)) or plain(model, batch, **k))  # fmt: skip
    _, apart = log_odds_of_changes(objective, "neuron", 1, changes)
    longest = max(pair.length for pair in objective.encoded)
    assert max(rows) * 2 * longest <= 300 and len(rows) > 9
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_changes_within_a_plan(load, tokenizer):
    model = load("llama")
    objective = Objective(model, tokenizer, SOME, Temperature(3.0))
    plan = gate(model, "attention", (0, 4, 1.5), (1, 7, -2.0), (2, 9, 2.5)) | gate(
        model, "neuron", (1, 3, 2.0), (2, 5, -2.0)
    )
    before, after = log_odds_of_changes(objective, "attention", 1, [(7, 2.0), (8, 1.0)], plan)
    torch.testing.assert_close(before, objective.log_odds(plan), rtol=1e-4, atol=1e-4)
    for (dim, value), row in zip([(7, 0.0), (8, 1.0)], after, strict=True):
        changed = {site: values.clone() for site, values in plan.items()}
        changed["attention"][1, dim] = value
        torch.testing.assert_close(row, objective.log_odds(changed), rtol=1e-4, atol=1e-4)
    assert float((after - before).abs().min(1).values.max()) > 1e-3


# the objective


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_gradient_and_curvature_against_differences(checkpoints, tokenizer, kernel, monkeypatch):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu", attn_implementation=kernel)
    objective = Objective(model, tokenizer, SOME, Temperature(3.0))
    at = gate(model, "attention", (0, 4, 0.5), (2, 9, -0.3)) | gate(model, "neuron", (1, 3, 0.4))
    direction = gate(model, "attention", (0, 4, 0.7), (1, 7, -1.0)) | gate(model, "neuron", (1, 3, 0.5), (2, 5, -0.6))

    def moved(by):
        return {site: at[site] + by * direction[site] for site in at}

    gradient = objective.gradient(at)
    slope = sum(float((gradient[site] * direction[site]).sum()) for site in at)
    assert slope == pytest.approx((objective.value(moved(0.02)) - objective.value(moved(-0.02))) / 0.04, rel=1e-2)
    product, how = objective.curvature(at, direction)
    assert how == "a double backward pass"
    ahead, behind = objective.gradient(moved(0.01)), objective.gradient(moved(-0.01))
    for site, values in product.items():
        torch.testing.assert_close(values, (ahead[site] - behind[site]) / 0.02, rtol=1e-2, atol=1e-4)
    second = sum(float((product[site] * direction[site]).sum()) for site in at)
    bend = objective.value(moved(0.1)) - 2 * objective.value(at) + objective.value(moved(-0.1))
    assert second == pytest.approx(bend / 0.1**2, rel=5e-2)
    if kernel == "sdpa":  # a kernel whose backward pass cannot be differentiated, as the flash kernels'
        monkeypatch.setattr(austeer.objective.SDPBackend, "MATH", SDPBackend.FLASH_ATTENTION, raising=False)
        differences, how = objective.curvature(at, direction)
        assert how == "differences of two gradients"
        for site, values in product.items():
            torch.testing.assert_close(differences[site], values, rtol=2e-2, atol=1e-4)


def test_pairs_of_equal_tokens_are_left_out_and_order_is_kept(llama, tokenizer):
    pairs = [SOME[0], Pair("Is it?", " yes", " yes"), *SOME[1:]]
    objective = Objective(llama, tokenizer, pairs, Temperature(3.0, {" yes": 0.4, " no": -0.4}))
    assert objective.pairs == SOME and len(objective) == 5
    alone = [Objective(llama, tokenizer, [pair], objective.temperature) for pair in SOME]
    nothing = no_gates(llama, ["ffn"])
    each = torch.cat([one.log_odds(nothing) for one in alone])
    torch.testing.assert_close(objective.log_odds(nothing), each, rtol=1e-5, atol=1e-5)
    assert objective.value(nothing) == pytest.approx(sum(one.value(nothing) for one in alone) / 5, rel=1e-5)
    mean = sum(one.gradient(nothing)["ffn"] for one in alone) / 5
    torch.testing.assert_close(objective.gradient(nothing)["ffn"], mean, rtol=1e-3, atol=1e-6)
    with pytest.raises(AUSteerError, match="the same tokens"):
        Objective(llama, tokenizer, pairs[1:2], None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_integrated_shares_add_up_to_the_gain(load, tokenizer, family):
    model = load(family)
    objective = Objective(model, tokenizer, SOME, Temperature(3.0))
    sites = ["attention", "neuron"]
    draw = torch.Generator().manual_seed(1)
    gates = {s: 0.1 * torch.randn(rmodels.site_shape(model, s), generator=draw) for s in sites}
    found = integrated_gradients(objective, gates)
    nothing = {site: values * 0 for site, values in gates.items()}
    gain = objective.value(gates) - objective.value(nothing)
    assert abs(gain) > 1e-3 and found.gain == gain and found.gap < 0.01
    assert found.total == pytest.approx(gain, rel=0.01)
    slope = sum(float((v * gates[s]).sum()) for s, v in objective.gradient(nothing).items())
    assert abs(slope - gain) > 0.03 * abs(gain), "first order alone is not complete here"
    for site in sites:
        torch.testing.assert_close(found.shares[site], found.gradient[site] * gates[site].double())


def test_plans_that_are_not_gates_alone_are_refused():
    one = torch.eye(3)
    assert gates_of(Plan({"ffn": one}))["ffn"] is one
    for plan in (Plan({"ffn": one}, {"ffn": one}), Plan({"ffn": one}, tokens="last")):
        with pytest.raises(AUSteerError, match="at all tokens and shifts none"):
            gates_of(plan)
    with pytest.raises(AUSteerError, match="steers no AU"):
        gates_of(Plan({"ffn": 0 * one}))


# where first order lies


def test_which_predictions_are_lies():
    predicted = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    true = torch.tensor([0.51, 0.49, 1.99, 2.01, -0.6, 0.6, 0.1, 0.0])
    assert first_order_lies(predicted, true).tolist() == [False, True, False, True, False, True, True, True]


def test_a_check_finds_the_aus_that_lie_and_the_plan_loses_them(load, tokenizer):
    model = load("llama")
    objective = Objective(model, tokenizer, SOME, Temperature(3.0))
    draw = torch.Generator().manual_seed(0)
    scales = {
        s: 2.5 * torch.randn(rmodels.site_shape(model, s), generator=draw).clamp(-1, 1) for s in ("attention", "neuron")
    }
    gradient = objective.gradient({site: values * 0 for site, values in scales.items()})
    aus = strongest(scales, gradient, 12)
    worth = {(s, *at): abs(float(scales[s][tuple(at)] * gradient[s][tuple(at)])) for s in scales for at in scales[s].nonzero().tolist()}  # fmt: skip
    assert aus == sorted(worth, key=worth.get, reverse=True)[:12] and len({site for site, *_ in aus}) == 2
    check = check_first_order(objective, scales, aus)
    nothing = no_gates(model, list(scales))
    for au, predicted, true in zip(aus, check.predicted.tolist(), check.true.tolist(), strict=True):
        site, layer, dim = au
        dose = float(scales[site][layer, dim])
        alone = objective.value(gate(model, site, (layer, dim, dose))) - objective.value(nothing)
        assert true == pytest.approx(alone, rel=1e-2, abs=1e-5)
        assert predicted == pytest.approx(dose * float(gradient[site][layer, dim]), rel=1e-5)
    assert 0 < int(check.lies.sum()) < 12, "this model shows both"
    reduced = without_lies(scales, check)
    for (site, layer, dim), lies in zip(aus, check.lies.tolist(), strict=True):
        assert float(reduced[site][layer, dim]) == (0.0 if lies else float(scales[site][layer, dim]))
    kept, before = (sum(int((values != 0).sum()) for values in gates.values()) for gates in (reduced, scales))
    assert before - kept == int(check.lies.sum()) > 0
    inside = (check.true / check.predicted).clamp(0, 2) == check.true / check.predicted
    assert torch.allclose((check.ratio * check.predicted)[inside], check.true[inside])
    assert set(check.ratio[~inside].tolist()) <= {0.0, 2.0} and not inside.all()
    layers = [layer for _, layer, _ in aus]
    per_layer = {(site, layer) for site, layer, _ in aus}
    expected = 10 * (len(per_layer) + sum(1 - n / 3 for n in layers) + sum(1 - n / 3 for _, n in per_layer))
    assert check.forwards == pytest.approx(expected)
    assert Check(aus, check.predicted * 0, check.true, 1.0).ratio.tolist() == [1.0] * 12


# the command


@pytest.fixture(scope="module")
def setup(checkpoints, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("command")
    pairs = [Pair(f"Question: number {i}, is {a} {w}?\nAnswer:", r, f) for i, (a, w, r, f) in enumerate(
        [("iron", "heavy", " yes", " no"), ("a mouse", "loud", " no", " yes")] * 30)]  # fmt: skip
    write_pairs(folder / "mine.jsonl", pairs)
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    plan = None
    for site in ("attention", "neuron"):
        one = set_MFU(screen(pairs, model, tokenizer, [site], momentum="causal", progress=False)[site], 20, 3.0)
        plan = one if plan is None else plan + one
    plan.save(folder / "plan.safetensors")
    return ["truth", "--model", str(checkpoints["llama"]), "--pairs", str(folder / "mine.jsonl"), "--device", "cpu",
            "--dtype", "float32", "--plan", str(folder / "plan.safetensors"), "--top", "6", "--n", "5",
            "--results", str(folder)], folder  # fmt: skip


def ranks_in(folder, checkpoints):
    """Rank the neurons of the command's pairs, and return the file."""
    command = ["--model", str(checkpoints["llama"]), "--pairs", str(folder / "mine.jsonl"), "--momentum", "causal"]
    rank_command.main([*command, "--site", "neuron", "--dtype", "float32", "--device", "cpu", "--out", str(folder / "ranks"), "--force"])  # fmt: skip
    return folder / "ranks" / "neuron.safetensors"


@pytest.mark.slow
def test_the_command_measures_prints_and_goes_on_where_it_was(setup, capsys, monkeypatch, checkpoints, tokenizer):
    argv, folder = setup
    ranked = ranks_in(folder, checkpoints)
    main.main([*argv, "--all", "--flag", str(ranked), "--out", str(folder / "flagged")])
    printed = capsys.readouterr().out
    (file,) = (folder / "truth").glob("*.json")
    record = json.loads(file.read_text())
    assert (folder / "truth-llama-mine.png").stat().st_size > 10_000
    for text in ("attention, each score's strongest AUs, alone, at dose 0.1", "alone, at dose 1", "within the plan", "RelP",
                 "by a double backward pass", "without the AUs that lie", "CNA-like"):  # fmt: skip
        assert text in printed

    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    tempered = Temperature.of_header({"tau": record["temperature"]["tau"], "offsets": record["temperature"]["offsets"]})
    task = main.importlib.import_module("eval.tasks.own_pairs").PairTask("mine", [Pair(**row) for row in map(json.loads, (folder / "mine.jsonl").open())])  # fmt: skip
    judged = Objective(model, tokenizer, task.validation[:5], tempered)
    plan = Plan.load(folder / "plan.safetensors").scales
    nothing = no_gates(model, ["attention", "neuron"])
    for site, changes in record["changes"].items():
        for run, values in list(changes.items())[::20]:
            layer, dim, dose, *within = run.split()
            au = site, int(layer), int(dim)
            if within:
                changed = {s: v.clone() for s, v in plan.items()}
                assert float(dose) == pytest.approx(float(plan[site][au[1:]]))
                changed[site][au[1:]] = 0.0
                expected = judged.value(plan) - judged.value(changed)
            else:
                expected = judged.value(nothing | gate(model, site, (*au[1:], float(dose)))) - judged.value(nothing)
            assert float(np.mean(values)) == pytest.approx(expected, rel=2e-2, abs=2e-6)

    gradient = judged.gradient(nothing)
    row = next(r for r in record["rows"] if r["by"] == "plan" and r["dose"] == "plan" and r["score"] == "gradient")
    aus = strongest(
        {row["site"]: plan[row["site"]]}, Objective(model, tokenizer, task.pairs, tempered).gradient(nothing), 6
    )
    predicted = [
        float(plan[s][at] * gradient[s][at]) for s, *at in ((s, a, b) for s, a, b in aus) for at in [tuple(at)]
    ]
    true = [np.mean(record["changes"][s][f"{a} {b} {float(plan[s][a, b]):.6g}"]) for s, a, b in aus]
    assert row["judged"]["rho"][0] == pytest.approx(spearmanr(predicted, true).statistic)
    assert row["judged"]["slope"] == pytest.approx(np.dot(predicted, true) / np.dot(predicted, predicted), rel=1e-3)
    assert row["judged"]["same_way"] == pytest.approx(np.mean(np.multiply(predicted, true) > 0))

    lies = {row["site"]: row["lies"] for row in record["correction"]["rows"]}
    assert not AURanks.load(ranked).lies.any(), "the ranks themselves stay as they are"
    assert (
        AURanks.load(folder / "flagged" / ranked.name).lies.nonzero().tolist() == sorted(lies["neuron"])
        and lies["neuron"]
    )
    reduced = {site: values.clone() for site, values in plan.items()}
    for site, aus in lies.items():
        for layer, dim in aus:
            reduced[site][layer, dim] = 0.0
    for name, gates in {"plan": plan, "reduced plan": reduced}.items():
        assert record["correction"][name] == pytest.approx(
            judged.value(gates) - judged.value(nothing), rel=1e-3, abs=1e-6
        )

    # a killed run: some changes are missing, and only those are measured again
    lost = dict(list(record["changes"]["neuron"].items())[-4:])
    for run in lost:
        del record["changes"]["neuron"][run]
    file.write_text(json.dumps(record))
    measured, plain = [], measure_truth.truth.log_odds_of_changes
    monkeypatch.setattr(measure_truth.truth, "code_hash", lambda *roots: record["code"])
    monkeypatch.setattr(measure_truth.truth, "log_odds_of_changes", lambda o, s, layer, changes, p: measured.extend(changes) or plain(o, s, layer, changes, p))  # fmt: skip
    monkeypatch.setattr(measure_truth, "_draw", lambda *args: None)  # the picture has been drawn and looked at above
    main.main([*argv, "--all"])
    again = json.loads(file.read_text())
    assert len(measured) == 4
    for run, values in lost.items():
        assert again["changes"]["neuron"][run] == pytest.approx(values, rel=1e-2, abs=1e-6)
    assert len(list((folder / "truth").glob("*.json"))) == 1


def test_without_a_plan_one_of_the_stated_cost_is_made(setup, capsys, tmp_path):
    argv = setup[0]
    at = argv.index("--plan")
    main.main([*argv[:at], *argv[at + 2 :], "--results", str(tmp_path), "--top", "2", "--n", "2", "--kl", "0.004", "--site", "neuron"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "atomic units, tokens: all" in printed and "neuron, the plan's strongest AUs, alone" in printed
    assert "attention" not in printed


@pytest.mark.parametrize("more, reason", [
    (["--top", "1"], "--top must be at least 2"),
    (["--data_name", "copa"], "either --pairs"),
    (["--site", "ffn"], "no gates at ffn"),
    (["--site", "attention", "ffn"], "no gates at ffn"),
    (["--site", "attention", "--flag", "RANKS", "--out", "x"], "the ranks of site neuron, which is not checked"),
    (["--flag", "OTHER", "--out", "x"], "the ranks of other weights"),
    (["--flag", "PLAIN", "--out", "x"], "keeps no gradients"),
    (["--flag", "RANKS"], "--flag and --out belong together"),
])  # fmt: skip
def test_mistakes_are_named(setup, more, reason, checkpoints):
    argv, folder = setup
    if {"RANKS", "OTHER", "PLAIN"} & set(more):
        good = AURanks.load(ranks_in(folder, checkpoints))
        replace(good, header=good.header | {"fingerprint": "another"}).save(folder / "other.safetensors")
        replace(good, stats={}).save(folder / "plain.safetensors")
        files = {"RANKS": folder / "ranks" / "neuron.safetensors", "OTHER": folder / "other.safetensors",
                 "PLAIN": folder / "plain.safetensors"}  # fmt: skip
        more = [str(files.get(word, word)) for word in more]
    with pytest.raises(AUSteerError, match=reason):
        main.main([*argv, *more])
