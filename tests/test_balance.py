"""Balanced effects: by plain loops, on planted data, and in ranks, plans of a stated cost and the command."""

import math
from types import SimpleNamespace

import pytest
import torch

from austeer.balance import answer_numbers, balanced
from austeer.budget import Budget
from austeer.commands.rank import main as rank
from austeer.errors import AUSteerError
from austeer.fisher import Fisher
from austeer.pair_effects import PairEffects
from austeer.pairs import Pair, write_pairs
from austeer.ranks import AURanks
from MFU_screening import balanced_t_statistic, screen

# three in four pairs are right with yes
YES_NO = [Pair(f"Is {i} odd?", *((" yes", " no") if i % 4 else (" no", " yes"))) for i in range(80)]
YES = torch.tensor([pair.positive == " yes" for pair in YES_NO])


def test_by_a_plain_loop():
    effects = torch.randn(80, 2, 3, generator=torch.Generator().manual_seed(0)).double() + 0.05
    right = answer_numbers(YES_NO)[:, 0]
    mean, error = balanced(effects, right)
    for layer in range(2):
        for dim in range(3):
            means, variances = [], []
            for answer in (" no", " yes"):
                values = [
                    float(e[layer, dim]) for e, pair in zip(effects, YES_NO, strict=True) if pair.positive == answer
                ]
                center = sum(values) / len(values)
                means.append(center)
                variances.append(sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))
            same = means[0] * means[1] > 0
            assert float(mean[layer, dim]) == pytest.approx(sum(means) / 2 if same else 0, abs=1e-12)
            assert float(error[layer, dim]) == pytest.approx(math.sqrt(sum(variances)) / 2)
    assert 0 < int((mean == 0).sum()) < 6, "both cases are there"


def planted():
    """Per-pair effects of (pairs, 1, 4): AU 0 says yes, AU 1 finds the right answer, 2 and 3 are noise."""
    noise = torch.randn(80, 1, 4, generator=torch.Generator().manual_seed(1)).double()
    effects = 0.1 * noise
    effects[:, 0, 0] += torch.where(YES, 1.0, -0.2).double()
    effects[:, 0, 1] = 0.2 + 0.4 * noise[:, 0, 1]
    return effects


def test_what_only_says_yes_ranks_first_without_and_last_with_balance():
    effects = planted()
    plain = {"sum": effects.sum(0), "sum_squares": effects.square().sum(0)}
    mean, error = balanced(effects, answer_numbers(YES_NO)[:, 0])
    without, _ = balanced_t_statistic(plain, 80)
    with_balance, gain = balanced_t_statistic(plain | {"balanced_mean": mean, "balanced_error": error}, 80)
    assert int(without.abs().argmax()) == 0
    assert int(with_balance.abs().argmax()) == 1 and float(with_balance[0, 0]) == 0 == float(gain[0, 0])
    assert float(with_balance[0, 1]) == pytest.approx(float(mean[0, 1] / error[0, 1]))


@pytest.mark.parametrize("estimate", ["bound", "discriminant"])
def test_a_plan_of_a_stated_cost_leaves_out_what_only_says_yes(estimate):
    effects, z = planted()[:, 0], torch.zeros(80, dtype=torch.float64)
    kept = {"gradients": 2 * effects[:, None], "log_odds": z, "offsets": z, "groups": torch.arange(80)}
    header = {"tau": 1.0, "fingerprint": "f", "pairs_hash": "p"}
    fisher = Fisher(
        {"ffn": torch.ones(1, 4)},
        {"ffn": torch.randn(50, 1, 4)},
        measure=torch.zeros(1, 4),
        report=torch.zeros(1, 4),
        header={"fingerprint": "f", "positions": 1, "draws": 2},
    )
    gates = {}
    for balance in (False, True):
        stats = kept | ({"answers": answer_numbers(YES_NO)} if balance else {})
        ranks = AURanks("ffn", torch.zeros(1, 4), torch.zeros(1, 4), stats, header)
        gates[balance] = Budget([ranks], fisher, estimate=estimate).plan(0.01, 4).scales["ffn"][0]
    assert int(gates[False].abs().argmax()) == 0 and float(gates[False][0]) > 0
    assert float(gates[True][0]) == 0 < float(gates[True][1])


def test_swapped_answers_are_balanced_as_they_are_then():
    z = torch.zeros(80, dtype=torch.float64)
    effects = PairEffects(planted()[:, 0], z, 1.0, torch.arange(80), answer_numbers(YES_NO))
    swapped = effects.with_answers_swapped(0)
    turned = (swapped.gradients[:, 1] * effects.gradients[:, 1]) < 0
    assert 20 < int(turned.sum()) < 60
    right = torch.where(turned, 1 - effects.answers[:, 0], effects.answers[:, 0])
    assert swapped.answers[:, 0].tolist() == right.tolist()
    part = effects.only(YES)
    assert part.answers[:, 0].unique().tolist() == [1]


def test_ranks_are_balanced_from_the_gradients_of_every_pair(llama, tokenizer):
    pairs = YES_NO[:40]
    ranks = screen(pairs, llama, tokenizer, ["ffn"], momentum="causal-tempered", balance=True, progress=False)["ffn"]
    plain = screen(pairs, llama, tokenizer, ["ffn"], momentum="causal-tempered", progress=False)["ffn"]
    stats = ranks.stats
    slope = torch.sigmoid(-(stats["log_odds"] - stats["offsets"]) / ranks.header["tau"]) / ranks.header["tau"]
    mean, error = balanced(stats["gradients"].double() * slope[:, None, None], answer_numbers(pairs)[:, 0])
    torch.testing.assert_close(stats["balanced_mean"], mean)
    expected = torch.where(mean == 0, 0.0, mean / error).float()
    torch.testing.assert_close(ranks.score, expected, rtol=1e-4, atol=1e-5)
    assert ranks.header["balanced"] is True and "balanced" not in plain.header and "answers" not in plain.stats
    assert 0 < int((ranks.score == 0).sum()) < ranks.score.numel() and int((plain.score == 0).sum()) == 0
    assert PairEffects.of([ranks]).answers is not None and PairEffects.of([plain]).answers is None


def test_the_method_takes_balance_as_an_option(llama, tokenizer, monkeypatch):
    from austeer.methods import fisher as methods

    pairs = YES_NO[:40]
    ranks = screen(pairs, llama, tokenizer, ["ffn"], momentum="causal-tempered", progress=False)["ffn"]
    given = []
    monkeypatch.setattr(methods, "Budget", lambda ranks, fisher, **options: given.append(options))
    costs = SimpleNamespace(fisher=lambda sites: None, meter=lambda: None)
    evidence = SimpleNamespace(site="ffn", ranks=lambda momentum, site: ranks, pairs=pairs, costs=costs)
    methods.KLBudget(balance=True).prepare(evidence)
    methods.KLBudget().prepare(evidence)
    assert given[0]["effects"].answers.tolist() == answer_numbers(pairs).tolist() and "effects" not in given[1]


@pytest.mark.parametrize("pairs", [
    [Pair(f"{i}?", f" {i}", f" {i + 1}") for i in range(40)],
    [Pair(f"{i}?", " yes", " no") for i in range(40)],
    [Pair(f"{i}?", *((" yes", " no") if i > 3 else (" no", " yes"))) for i in range(40)],
])  # fmt: skip
def test_pairs_without_shared_answers_are_refused(pairs):
    with pytest.raises(AUSteerError, match="a few answers that all pairs share"):
        answer_numbers(pairs)


def test_the_command(checkpoints, tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl", YES_NO[:40])
    command = ["--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu",
               "--out", str(tmp_path / "ranks.safetensors")]  # fmt: skip
    with pytest.raises(AUSteerError, match="only causal momentum can be balanced"):
        rank([*command, "--balance"])
    command += ["--momentum", "causal", "--temperature", "1"]
    rank([*command, "--balance"])
    ranks = AURanks.load(tmp_path / "ranks.safetensors")
    assert ranks.header["balanced"] is True and ranks.header["tau"] == 1
    capsys.readouterr()
    rank([*command, "--balance"])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(AUSteerError, match=r"differs in .*balanced"):
        rank([*command[:-2], "--temperature", "fitted"])
