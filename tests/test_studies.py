"""The studies against plain loops, with weights folded by hand in place of plans."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_cell import bench_for
from scipy.stats import spearmanr

from austeer.errors import AUSteerError
from austeer.pairs import Pair, write_pairs
from embedded import acceptance
from embedded import tasks as small_world
from eval.tasks.base import PairSet
from experiments.costs import neutral_of
from MFU_screening import screen
from paper import measure_effect
from paper.studies import STUDIES, convergence, dimension_sweep, effect, overhead, picture, rank_stability, top_tokens
from paper.studies.block import Block, next_token
from paper.studies.ranks import rank_sites
from set_MFU import set_MFU

BENCH = bench_for(Path("nowhere"), task="svamp", limit=24, n_pairs=12)
HEAD = {"site": "attention", "layer": 0, "head": 1}
SMALL = {
    "dimension_sweep": {
        **HEAD, "step": 6, "alpha": 5.0, "n": 24, "positive": 9, "mixed": 1, "paper_dims": {"positive": [3, 7], "mixed": [11]},
    },
    "convergence": {**HEAD, "dims": [2, 0], "strengths": [10, 1000, 100000], "prompts": 3},
    "top_tokens": {**HEAD, "dims": None, "step": 8, "alpha": 20.0, "n": 24, "answer": None, "item": None},
    "score_map": {"momentum": "causal", "threshold": 2.0},
    "overlap": {"momentum": "activation", "k": 8, "tasks": ["boolq", "svamp", "tone"]},
    "rank_stability": {"ks": [2, 8], "draws": 3, "seed": 0},
    "strengths": {"k": 8, "alphas": [0.5, 2.0], "sites": ["attention", "ffn"]},
    "effect": {"site": "attention", "strengths": [0.5, 20.0], "top": 2, "random": 4, "n": 7, "seed": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return {name: STUDIES[name].measure(BENCH, params, False) for name, params in SMALL.items()}


def folded(strengths, site="attention", layer=0, first=32):
    """Return the model with these dimensions scaled in its weights: no gate, no plan. Head 1 begins at 32."""
    model, tokenizer = BENCH.model, BENCH.tokenizer
    twin = copy.deepcopy(model)
    block = twin.model.layers[layer]
    for dim, strength in strengths.items():
        if site == "attention":
            block.self_attn.o_proj.weight[:, first + dim] *= 1 + strength
        else:
            block.mlp.down_proj.weight[dim] *= 1 + strength
    return twin, tokenizer


def right(strengths, items, **where):
    answers = acceptance.answer(*folded(strengths, **where), [item.prompt for item in items], 1)
    return sum(answer.strip() == item.right for answer, item in zip(answers, items, strict=True))


def test_every_study_is_measured_in_small():
    elsewhere = {"side_effects"}  # tests/test_side_effects.py
    assert set(SMALL) | elsewhere == {name for name, study in STUDIES.items() if hasattr(study, "draw")}


def test_strengths_cost_what_two_models_differ_by(results):
    """KL by hand, between the model and one whose weights hold the plan."""
    found = results["strengths"]
    ranks = rank_sites(BENCH, "activation", ["attention"], False)["attention"]
    texts = neutral_of(BENCH).part("measure")
    half = texts.shape[1] // 2
    for alpha, kl in zip([0.5, 2.0], found["kl"]["attention"], strict=True):
        twin = copy.deepcopy(BENCH.model)
        for site, layer, dim, scale, _ in set_MFU(ranks, k=8, alpha=alpha).aus():
            assert site == "attention"
            twin.model.layers[layer].self_attn.o_proj.weight[:, dim] *= 1 + scale
        with torch.inference_mode():
            plain, steered = (m(texts).logits[:, half - 1 : -1].log_softmax(-1) for m in (BENCH.model, twin))
        assert kl == pytest.approx(float((plain.exp() * (plain - steered)).sum(-1).mean()), rel=1e-3)
    low, high = found["kl"]["ffn"]
    assert 0 < low < high


def test_sweep_counts_what_a_plain_loop_counts(results):
    swept, task = results["dimension_sweep"], BENCH.task
    assert swept["dims"] == [0, 6, 12, 18, 24, 30] and swept["n"] == {"validation": 24, "test": 24}
    for part, items in (("validation", task.validation), ("test", task.test)):
        assert swept["vanilla"][part] == right({}, items)
        assert swept["right"][part] == [right({dim: 5.0}, items) for dim in swept["dims"]]
    assert swept["whole"]["block"]["right"] == right(dict.fromkeys(range(32), 5.0), task.test)
    own = swept["combinations"]["paper"]
    assert own["positive"]["dims"] == [3, 7] and own["mixed"]["dims"] == [3, 7, 11]
    for part, both in swept["combinations"].items():
        for combination in both.values():
            assert combination["right"] == right(dict.fromkeys(combination["dims"], 5.0), task.test)
        if part == "paper":
            continue
        gains = {dim: r - swept["vanilla"][part] for dim, r in zip(swept["dims"], swept["right"][part], strict=True)}
        good = sorted((d for d in gains if gains[d] > 0), key=lambda d: -gains[d])
        assert both["positive"]["dims"] == good
        if good and min(gains.values()) < 0:
            assert both["mixed"]["dims"] == [*good, min(gains, key=gains.__getitem__)]

    assert set(swept["combinations"]["validation"]) == {"positive", "mixed"}


def test_mixed_adds_the_worst_of_those_that_harm():
    gains = {0: 3, 1: -2, 2: 0, 3: 3, 4: -5, 5: 1}
    assert dimension_sweep._beneficial(gains, 2) == [0, 3] and dimension_sweep._beneficial(gains, 9) == [0, 3, 5]
    assert dimension_sweep._detrimental(gains, 1) == [4] and dimension_sweep._detrimental({0: 0, 1: 2}, 2) == []


def test_a_sweep_says_its_step_and_why_a_combination_is_missing():
    results = {"dims": [0, 4, 8], "combinations": {
        "validation": {"positive": {"dims": []}},
        "test": {"positive": {"dims": [4, 0]}},
        "paper": {"positive": {"dims": [8]}, "mixed": {"dims": [8, 4]}},
    }}  # fmt: skip
    assert dimension_sweep.note(results, {"step": 4}) == (
        "Swept: one dimension in 4, 3 in all. Chosen on validation: no combination, because no swept dimension helps there. "
        "Chosen on test: positive 4, 0; no mixed combination, because no swept dimension harms there. The paper's dimensions: positive 8; mixed adds 4."
    )
    assert dimension_sweep.note(results, {"step": 1}).startswith("Swept: all 3 dimensions.")


def test_names_of_lines_keep_apart_and_in_order():
    assert picture.spread([0.5, 0.1], 0.1) == [0.5, 0.1], "far enough apart: where they are"
    assert picture.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert picture.spread([1.0, 0.98, 0.0], 0.1) == pytest.approx([1.0, 0.9, 0.0]), "never outside"
    crowded = picture.spread([0.3] * 30, 0.1)
    assert crowded == sorted(crowded) and crowded[-1] == pytest.approx(1.0), "too many overflow downwards"


def test_the_prompt_stands_below_the_tokens():
    results = {"item": 3, "prompt": "Is `a`\nb?", "answer": "yes"}
    assert top_tokens.note(results, {}) == "The prompt (test item 3): `Is 'a' ⏎ b?` The right answer: yes."


def test_what_is_zero_by_construction_is_no_convergence():
    results = {"nats": [[4.0, 2.0, 0.0], [1.0, 0.2, 3.0], [0, 0, 2.0]], "strengths": [10, 100, 1000], "dims": [5, 19]}
    assert convergence.note(results, {}) == (
        "In shares of the largest divergence: at strength 100 AU 5 is 0.250 from its output at 1000, and AU 19 "
        "0.050 from its own. The two are 0.000 apart at 10, at most 0.750 (at 100), and 0.500 at 1000."
    )


def test_next_token_is_that_of_folded_weights():
    model, tokenizer, task = BENCH.model, BENCH.tokenizer, BENCH.task
    prompt = task.test[0].prompt
    for where, first in ((HEAD, 32), ({"site": "ffn", "layer": 2}, 0)):
        block = Block.of(model, where)
        rows = next_token(
            model, tokenizer, prompt, [block.plan({}), block.plan({3: 9.0}), block.plan({3: 2.0, 5: -1.0})]
        )
        for row, strengths in zip(rows, ({}, {3: 9.0}, {3: 2.0, 5: -1.0}), strict=True):
            twin, _ = folded(strengths, where["site"], where["layer"], first)
            logits = twin(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(row, logits.double().log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_convergence_is_the_mean_divergence(results):
    tokenizer, task = BENCH.tokenizer, BENCH.task
    prompts = [item.prompt for item in task.test[:3]]

    def output(dim, strength, prompt):
        twin, _ = folded({dim: strength})
        return twin(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double().softmax(-1)

    def plain(p, q):
        return float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))

    nats = results["convergence"]["nats"]
    expected = [
        sum(plain(output(a, s, prompt), output(b, t, prompt)) for prompt in prompts) / 3
        for a, s, b, t in ((2, 10, 2, 100000), (0, 10, 0, 100000), (2, 10, 0, 10))
    ]
    assert nats[0] == pytest.approx(expected, rel=1e-3)
    assert nats[-1][:2] == [0, 0] and nats[-1][2] > 0
    with pytest.raises(AUSteerError, match="ascending"):
        convergence.measure(BENCH, {**SMALL["convergence"], "strengths": [100, 10]}, False)


def test_top_tokens_are_the_likeliest(results):
    top, tokenizer, task = results["top_tokens"], BENCH.tokenizer, BENCH.task
    strengths = {column["dim"]: {} if column["dim"] is None else {column["dim"]: 20.0} for column in top["columns"]}
    assert [column["name"] for column in top["columns"]] == ["unsteered", "best", "neutral", "worst"]
    for column in top["columns"]:
        twin, _ = folded(strengths[column["dim"]])
        p = twin(**tokenizer(top["prompt"], return_tensors="pt")).logits[0, -1].softmax(-1)
        order = p.argsort(descending=True)[:5].tolist()
        assert [token for token, _ in column["top"]] == tokenizer.convert_ids_to_tokens(order)
        assert [shown for _, shown in column["top"]] == pytest.approx(p[order].tolist(), abs=1e-5)
    before = [right({}, [item]) for item in task.test]
    after = [any(right(s, [item]) for s in strengths.values() if s) for item in task.test]
    assert top["item"] == next((i for i in range(24) if after[i] > before[i]), 0)
    assert top["answer"] == task.test[top["item"]].right
    assert [top_tokens._printable(token) for token in ("▁no", "Ġyes", "'s", "é")] == [
        "'_no'",
        "'_yes'",
        '"\'s"',
        r"'\xe9'",
    ]


def test_the_item_may_have_to_have_an_answer():
    items = BENCH.task.test
    rare = items[5].right
    found = [i for i, item in enumerate(items) if item.right == rare]
    assert top_tokens._with_answer(items, rare) == found and 0 < len(found) < len(items)
    assert top_tokens._with_answer(items, None) == list(range(len(items)))
    result = top_tokens.measure(BENCH, {**SMALL["top_tokens"], "dims": [0, 1, 2], "answer": rare}, False)
    assert result["item"] in found and result["answer"] == rare
    with pytest.raises(AUSteerError, match="no item of the first 24 has the answer 'yes': raise n or change answer"):
        top_tokens.measure(BENCH, {**SMALL["top_tokens"], "dims": [0, 1, 2], "answer": "yes"}, False)


def test_the_papers_numbers_stand_in_their_cells(results, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(picture, "write_labels", lambda axis, values, image, texts: written.append(texts))
    draw = {name: STUDIES[name].draw for name in ("convergence", "top_tokens", "overlap", "dimension_sweep")}
    stored, path = dict(results), tmp_path / "a.png"
    draw["convergence"](stored["convergence"], SMALL["convergence"], path, [[0.1, 0.2, 0.3]] * 3)
    assert [text.partition("\n")[2] for text in written[-1][0]] == ["paper 0.100", "paper 0.200", "paper 0.300"]
    dim = str(stored["top_tokens"]["columns"][2]["dim"])
    draw["top_tokens"](stored["top_tokens"], SMALL["top_tokens"], path, {dim: ["_no", "NO", "a", "b", "c"]})
    assert written[-1][0][2].endswith("\npaper '_no'") and "paper" not in written[-1][0][1]
    shares = [[1.0], [0.1, 1.0], [0.0, 0.0, 1.0]]
    draw["overlap"](stored["overlap"], SMALL["overlap"], path, {"attention": shares, "ffn": shares})
    assert len(written) == 4 and written[-1][1][0].endswith("\npaper\n0.1")
    levels = []
    monkeypatch.setattr(picture, "draw_levels", lambda axis, drawn: levels.extend(drawn))
    draw["dimension_sweep"](stored["dimension_sweep"], SMALL["dimension_sweep"], path, {"ITI": 71.56})
    assert (levels[-1].name, levels[-1].y) == ("the paper's ITI", 71.56)
    assert path.exists()


def test_extremes_are_best_neutral_and_worst(results):
    block = Block.of(BENCH.model, HEAD)
    items = BENCH.task.validation
    gains = {dim: right({dim: 20.0}, items) - right({}, items) for dim in (0, 8, 16, 24)}
    best, neutral, worst = (column["dim"] for column in results["top_tokens"]["columns"][1:])
    assert gains[best] == max(gains.values()) and gains[worst] == min(gains.values())
    assert abs(gains[neutral]) == min(abs(gain) for dim, gain in gains.items() if dim not in (best, worst))
    assert str(block) == "2nd head of the 1st layer"


def test_score_map_holds_the_scores(results):
    model, tokenizer, task = BENCH.model, BENCH.tokenizer, BENCH.task
    ranks = screen(task.pairs, model, tokenizer, ["attention", "ffn"], momentum="causal", progress=False)
    for site, rows in results["score_map"]["scores"].items():
        scores = torch.tensor([[float(x) for x in row.split()] for row in rows])
        torch.testing.assert_close(scores, ranks[site].score.abs(), rtol=1e-3, atol=1e-3)
        assert results["score_map"]["marked"][site] == [int((row.abs() > 2).sum()) for row in ranks[site].score]


def test_overlap_is_of_one_model_and_all_tasks_pairs(results):
    model, tokenizer = BENCH.model, BENCH.tokenizer
    overlap, best = results["overlap"], {}
    assert overlap["on"] == "the embedded svamp model"
    for task in overlap["tasks"]:
        pairs = BENCH.pairs_of(task)
        ranks = screen(pairs, model, tokenizer, ["attention", "ffn"], progress=False)
        best[task] = {site: {(layer, dim) for layer, dim, _ in ranks[site].top(8)} for site in ranks}
    for site, of_site in overlap["sites"].items():
        assert of_site["by_chance"] == 8 / 512
        for i, row in enumerate(of_site["shared"]):
            assert row[i] == 1 and len(row) == i + 1
            for share, other in zip(row, overlap["tasks"], strict=False):
                assert share == len(best[overlap["tasks"][i]][site] & best[other][site]) / 8


def test_pairs_of_another_task_load_no_other_scorer(monkeypatch):
    asked = []
    monkeypatch.setattr("experiments.bench._task", lambda model, task, store: asked.append(task) or BENCH.task)
    replace(BENCH, task_spec=replace(BENCH.task_spec, toxicity="embedded")).pairs_of("toxicity")
    assert [(task.name, task.toxicity) for task in asked] == [("toxicity", "embedded")]


def test_pairs_of_another_task_are_limited_as_those_of_this_one():
    """Figure 12 of a dry run would otherwise rank on every pair of seven tasks."""
    few = replace(BENCH.task_spec, pairs=replace(BENCH.task_spec.pairs, n_pairs=7))
    assert replace(BENCH, task_spec=few).pairs_of("copa") == BENCH.pairs_of("copa")[:7]


@pytest.mark.parametrize("momentum", ["activation", "causal"])
def test_resamples_rank_as_if_pairs_were_repeated(momentum, monkeypatch):
    model, tokenizer, task = BENCH.model, BENCH.tokenizer, BENCH.task
    equal = Pair(task.pairs[0].prompt, "zzz", "qqq")  # unknown words: the same token
    pairs = [*task.pairs[:9], equal]
    monkeypatch.setattr(task, "_pair_set", PairSet(pairs, [pair.prompt for pair in pairs]))
    scores, n = rank_stability.resampled(BENCH, momentum, 3, 1, False)
    assert n == 10
    for draw, counts in enumerate(rank_stability._counts(10, 3, 1).T.int().tolist()):
        assert sum(counts) == 10 and (draw or counts == [1] * 10)
        repeated = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
        expected = screen(repeated, model, tokenizer, ["attention", "ffn"], momentum=momentum, progress=False)
        for site, ranks in expected.items():
            torch.testing.assert_close(scores[site][draw], ranks.score.abs(), rtol=2e-3, atol=2e-4)


def test_stability_is_one_where_all_draws_are_the_same_pairs(results, monkeypatch):
    shares = results["rank_stability"]["sites"]["attention"]["causal"]
    assert all(0 <= low <= mean <= high <= 1 for low, mean, high in zip(*(shares[key] for key in ("low", "mean", "high")), strict=True))  # fmt: skip
    monkeypatch.setattr(rank_stability, "_counts", lambda n, draws, seed: torch.ones(n, draws + 1).double())
    same = rank_stability.measure(BENCH, SMALL["rank_stability"], False)
    assert same["sites"]["ffn"]["activation"]["mean"] == [1.0, 1.0]


def test_effects_are_those_of_folded_weights_one_au_at_a_time(results):
    single, params, tokenizer = results["effect"], SMALL["effect"], BENCH.tokenizer
    items = BENCH.task.validation[:7]

    def log_odds(layer, dim, g):
        twin, _ = folded({dim: g}, layer=layer, first=0)
        for item in items:
            logp = twin(**tokenizer(item.prompt, return_tensors="pt")).logits[0, -1].double().log_softmax(-1)
            right, wrong = (tokenizer(item.prompt + a)["input_ids"][-1] for a in (item.right, item.wrong))
            yield float(logp[right] - logp[wrong])

    measures = {"M": lambda m: m, "log sigmoid(M)": lambda m: -math.log1p(math.exp(-m))}
    for g in params["strengths"]:
        for name, of in measures.items():
            expected = []
            for layer, dim in zip(single["layers"], single["dims"], strict=True):
                both = zip(log_odds(layer, dim, g), log_odds(layer, dim, -g), strict=True)
                expected.append(sum(of(up) - of(down) for up, down in both) / 2 / len(items))
            assert single["changes"][f"{g:g}"][name] == pytest.approx(expected, rel=1e-2, abs=2e-6)
    assert max(map(abs, single["changes"]["20"]["M"])) > 1e-2, "something was steered"


def test_effects_are_compared_with_the_scores_of_ranking(results):
    single, model, tokenizer, task = results["effect"], BENCH.model, BENCH.tokenizer, BENCH.task
    places, n = list(zip(single["layers"], single["dims"], strict=True)), len(task.pairs)
    ranks = {m: screen(task.pairs, model, tokenizer, ["attention"], momentum=m, progress=False)["attention"] for m in ("activation", "causal")}  # fmt: skip
    activation, causal = ranks["activation"], ranks["causal"]
    scores = {
        "activation": activation.gain, "difference": activation.stats["sum_momentum"] / n,
        "causal mean": causal.stats["sum"] / n, "causal t": causal.score,
    }  # fmt: skip
    chosen = set()
    for name, score in scores.items():
        assert single["scores"][name] == pytest.approx([float(score[place]) for place in places])
        best = {(au // 128, au % 128) for au in score.abs().flatten().topk(2).indices.tolist()}
        if name != "activation":  # with twelve pairs, many shares are equal
            assert {places[at] for at in single["best"][name]} == best
        chosen |= {places[at] for at in single["best"][name]}
    drawn = {places[at] for at in single["drawn"]}
    assert len(drawn) == 4 and chosen | drawn == set(places) and single["aus_of_site"] == 512
    for g, by_measure in single["changes"].items():
        for measure, change in by_measure.items():
            found = single["agreement"][g][measure]
            for name, values in single["scores"].items():
                same = [a * b > 0 for a, b in zip(values, change, strict=True)]
                assert found["scores"][name]["same_way"] == sum(same)
                assert found["scores"][name]["same_way_of_best"] == sum(same[at] for at in single["best"][name])
                assert found["scores"][name]["signed"][0] == pytest.approx(spearmanr(values, change).statistic)
                sizes = spearmanr([abs(v) for v in values], [abs(c) for c in change]).statistic
                assert found["scores"][name]["sizes"][0] == pytest.approx(sizes)
                few = [(values[at], change[at]) for at in single["drawn"]]
                assert found["scores"][name]["drawn"][0] == pytest.approx(spearmanr(few).statistic)


def test_what_the_effects_say_follows_from_the_intervals():
    above, around, below = [0.8, 0.7, 0.9], [0.1, -0.1, 0.3], [-0.5, -0.6, -0.4]
    rho = {"activation": below, "difference": around, "causal mean": above, "causal t": above}
    of_scores = {name: {"signed": three, "drawn": around} for name, three in rho.items()}
    found = {"halves": [0.9, 0.8, 1], "scores": of_scores}
    by_measure = {"M": found, "log sigmoid(M)": {**found, "scores": {**of_scores, "activation": of_scores["causal t"]}}}
    result = {"agreement": {"1": by_measure, "8": by_measure}, "drawn": [0, 1]}
    assert effect.note(result, {}) == (
        "Intervals of ρ with M that lie above 0, of 3: activation momentum 0 (and 2 below 0), mean difference 0, causal "
        "momentum (mean) 2, causal momentum (t) 2. Intervals of ρ with log sigmoid(M) that lie above 0, of 3: activation "
        "momentum 2, mean difference 0, causal momentum (mean) 2, causal momentum (t) 2. The 3 intervals are those of all AUs "
        "at g = 1, the 2 drawn at random alone, all AUs at g = 8. The changes on two halves of the held-out pairs correlate "
        "with ρ +0.90 for M, +0.90 for log sigmoid(M)."
    )


def test_effects_on_a_users_own_model_and_pairs(tmp_path, capsys):
    pairs = tmp_path / "mine.jsonl"
    write_pairs(pairs, [Pair(item.prompt, item.right, item.wrong) for item in small_world.items("svamp", "pairs", 60)])
    command = ["--model", str(acceptance.WEIGHTS / "svamp"), "--pairs", str(pairs), "--device", "cpu", "--results", str(tmp_path)]  # fmt: skip
    few = ["--site", "ffn", "--top", "2", "--random", "3", "--n", "6", "--strengths", "1"]
    measure_effect.main([*command, *few])
    printed = capsys.readouterr().out
    assert "change of M, g = 1" in printed and "causal momentum (t)" in printed and "6 held-out pairs" in printed
    assert (tmp_path / "effect-svamp-mine-ffn.png").stat().st_size > 10_000
    (record,) = (tmp_path / "records").iterdir()
    assert str(record) in printed
    written = record.stat().st_mtime_ns
    measure_effect.main([*command, *few])
    assert capsys.readouterr().out == printed and record.stat().st_mtime_ns == written, "found, not measured again"
    for wrong, message in ((["--strengths", "-1"], "positive"), (["--top", "1"], "--top must be at least 2")):
        with pytest.raises(AUSteerError, match=message):
            measure_effect.main([*command, *wrong])


def test_effects_need_wrong_answers_that_were_held_out(monkeypatch):
    items = [small_world.Item("Is it ? Answer : ", "yes", "", "", ())] * 3
    monkeypatch.setattr(BENCH.task, "validation", items)
    with pytest.raises(AUSteerError, match="no wrong answers"):
        effect.measure(BENCH, SMALL["effect"], False)
    monkeypatch.setattr(BENCH.task, "validation", [])
    with pytest.raises(AUSteerError, match="at least 2 held-out pairs"):
        effect.measure(BENCH, SMALL["effect"], False)


@pytest.mark.parametrize("name", list(SMALL))
def test_pictures_come_from_the_stored_record_alone(name, results, tmp_path, monkeypatch):
    stored = json.loads(json.dumps(results[name]))
    assert STUDIES[name].measure(BENCH, SMALL[name], False) == stored
    monkeypatch.setattr("rmodels.load", lambda *how: pytest.fail("a picture needs no model"))
    for file in ("a.png", "b.png") if name == "overlap" else ("a.png",):
        STUDIES[name].draw(stored, SMALL[name], tmp_path / "new" / file, {})
    pictures = [file.read_bytes() for file in sorted((tmp_path / "new").iterdir())]
    assert len(pictures[0]) > 10_000 and len(set(pictures)) == 1


def test_a_place_that_is_not_there_is_named():
    model = BENCH.model
    for wrong, message in (({"layer": 4}, "no layer 4"), ({"head": 4}, "no head 4"), ({"site": "ffn"}, "no head 1")):
        with pytest.raises(AUSteerError, match=message):
            Block.of(model, {**HEAD, **wrong})
    with pytest.raises(AUSteerError, match="no dimension 32: the 2nd head of the 1st layer has dimensions 0 to 31"):
        Block.of(model, HEAD).plan({32: 1.0})
    with pytest.raises(AUSteerError, match="at least three dimensions"):
        STUDIES["top_tokens"].measure(BENCH, {**SMALL["top_tokens"], "step": 16}, False)
    assert BENCH.pairs_of("copa")[0].positive in ("A", "B")


def test_memory_is_the_peak_of_all_gpus_and_is_reset_before_each_measurement(monkeypatch):
    peaks = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda gpu: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.update({gpu: 1_000_000_000}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[gpu])

    def work():
        peaks[1] += 500_000_000
        return "done"

    for _ in range(2):
        result, seconds, peak = overhead._measured(torch.device("cuda"), work)
        assert (result, peak) == ("done", 2.5) and seconds >= 0
    assert overhead._measured(torch.device("cpu"), work)[2] is None


@pytest.mark.slow
def test_overhead_times_every_method():
    result = STUDIES["overhead"].measure(BENCH, {"items": 5, "trials": 2}, False)
    assert (result["pairs"], result["items"], result["test"]) == (12, 5, 24)
    assert list(result["methods"]) == ["vanilla", "iti", "sadi", "austeer", "causal"]
    for name, one in result["methods"].items():
        assert len(one["s_per_sample"]) == 2 and min(one["s_per_sample"]) > 0
        assert one["prepare_s"] is None if name == "vanilla" else one["prepare_s"] > 0
        assert one["gb"] is one["prepare_gb"] is None, "on a CPU"
