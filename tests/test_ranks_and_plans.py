"""Pairs, ranks and plans: reading, writing, and what is refused."""

import json

import pytest
import torch
from conftest import PAIRS

from austeer.errors import AUSteerError
from austeer.identity import fingerprint
from austeer.pairs import Pair, pairs_hash, read_pairs, write_pairs
from austeer.plan import Plan
from austeer.ranks import AURanks
from MFU_screening import screen
from set_MFU import set_MFU


@pytest.fixture(scope="module")
def ranks(llama, tokenizer):
    return screen(PAIRS, llama, tokenizer, ["ffn"], progress=False)["ffn"]


# pairs


def test_pairs_round_trip_and_all_accepted_forms(tmp_path):
    pairs = [Pair("Is it?\n", " yes", " no"), Pair('say "x, y"', " é\u2028", " b\tc")]
    write_pairs(tmp_path / "a.jsonl", pairs)
    assert read_pairs(tmp_path / "a.jsonl") == pairs
    (tmp_path / "triples.jsonl").write_text("\n".join(json.dumps(list(pair)) for pair in pairs) + "\n\n")
    assert read_pairs(tmp_path / "triples.jsonl") == pairs
    (tmp_path / "array.json").write_text(json.dumps([list(pair) for pair in pairs], indent=1))
    assert read_pairs(tmp_path / "array.json") == pairs
    (tmp_path / "one.json").write_text(json.dumps([list(pairs[0])]))
    assert read_pairs(tmp_path / "one.json") == pairs[:1]
    (tmp_path / "equal.json").write_text('[["p", "a", "a"]]')
    assert read_pairs(tmp_path / "equal.json", check=False) == [Pair("p", "a", "a")]
    (tmp_path / "b.csv").write_text(
        '\ufeffprompt,positive,negative\n"Is it?\n", yes, no\n"say ""x, y""", é\u2028, b\tc\n', "utf-8"
    )
    assert read_pairs(tmp_path / "b.csv") == pairs
    (tmp_path / "c.jsonl").write_text(json.dumps({"q": "p", "good": "a", "bad": "b", "id": 3}))
    assert read_pairs(tmp_path / "c.jsonl", ["q", "good", "bad"]) == [Pair("p", "a", "b")]
    assert pairs_hash(pairs) == pairs_hash([list(pair) for pair in pairs]) != pairs_hash(pairs[::-1])


GOOD = '{"prompt": "p", "positive": "a", "negative": "b"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "holds no pairs"),
        ("a.jsonl", "\n\n", "holds no pairs"),
        ("a.jsonl", GOOD + "{oops}\n", "line 2: not JSON"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "p", "positive": "a"}',
            r"line 2: negative is missing or empty \(fields there: prompt, positive\)",
        ),
        ("a.jsonl", '{"prompt": "p", "positive": "", "negative": "b"}', "line 1: positive is empty"),
        ("a.jsonl", GOOD + '{"prompt": "p", "positive": "b", "negative": "b"}', "line 2: both answers are 'b'"),
        ("a.jsonl", '{"prompt": 3, "positive": "a", "negative": "b"}', "line 1: prompt is int, not text"),
        ("a.jsonl", '["p", "a"]', "line 1: expected an object"),
        ("a.csv", "prompt,positive\np,a\n", "line 2: negative is missing"),
        ("a.csv", 'prompt,positive,negative\n"p,a,b\n', "not CSV|positive is missing"),
    ],
)
def test_bad_pairs(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(AUSteerError, match=message):
        read_pairs(tmp_path / name)


def test_unreadable_pairs(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    for path, message in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "cannot read"),
        (tmp_path / "latin.jsonl", "not UTF-8"),
    ):
        with pytest.raises(AUSteerError, match=message):
            read_pairs(path)


# ranks


def test_ranks_round_trip(ranks, tmp_path):
    ranks.save(tmp_path / "deep" / "ffn.safetensors")
    again = AURanks.load(tmp_path / "deep" / "ffn.safetensors")
    assert again.site == "ffn" and torch.equal(again.score, ranks.score) and torch.equal(again.gain, ranks.gain)
    assert all(torch.equal(again.stats[name], ranks.stats[name]) for name in ranks.stats)
    ties = again.header.pop("ties_at_cut")
    assert again.header == ranks.header and ties["8"] == ranks.ties(8)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["ffn.safetensors"]
    expected = {
        "model",
        "revision",
        "fingerprint",
        "tokenizer",
        "pairs",
        "pairs_hash",
        "protocol",
        "momentum",
        "tie_rule",
        "versions",
    }
    assert expected <= set(ranks.header)


def test_ties_are_counted():
    score = torch.tensor([[0.5, -0.5, 0.9, 0.5]])
    ranks = AURanks("ffn", score, score)
    assert ranks.order.tolist() == [2, 0, 1, 3]
    assert [ranks.ties(k) for k in (1, 2, 3, 4, 9)] == [0, 2, 1, 0, 0]


def test_the_authors_files(ranks, tmp_path):
    ranks.save_authors(tmp_path / "ffn")
    lists = [
        torch.load(tmp_path / "ffn" / f"all_{n}.pt", weights_only=True) for n in ("scores", "layer_ids", "indices")
    ]
    assert lists == list(ranks) and lists[2][1] == [1, 2]
    again = AURanks.load(tmp_path / "ffn")
    assert again.site == "ffn" and torch.equal(again.score, ranks.score) and torch.equal(again.order, ranks.order)
    with pytest.raises(AUSteerError, match="do not name their site"):
        AURanks.load_authors(tmp_path)
    assert AURanks.load(tmp_path / "ffn", "attention").site == "attention"
    (tmp_path / "ffn" / "all_indices.pt").unlink()
    with pytest.raises(AUSteerError, match=r"has no all_indices.pt"):
        AURanks.load(tmp_path / "ffn")


def test_code_in_the_authors_files_is_never_run(ranks, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    ranks.save_authors(tmp_path / "ffn")
    torch.save(Evil(), tmp_path / "ffn" / "all_scores.pt")
    with pytest.raises(AUSteerError, match="was not read"):
        AURanks.load(tmp_path / "ffn")
    assert not (tmp_path / "pwned").exists()


def test_damaged_and_foreign_files(ranks, tmp_path):
    file = tmp_path / "ffn.safetensors"
    with pytest.raises(AUSteerError, match="no such file"):
        AURanks.load(file)
    ranks.save(file)
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(AUSteerError, match="damaged"):
            AURanks.load(file)
    set_MFU(ranks, 3, 1.0).save(file)
    with pytest.raises(AUSteerError, match="is not a ranks file"):
        AURanks.load(file)


def test_causal_ranks_do_not_fit_the_authors_lists(llama, tokenizer, tmp_path):
    causal = screen(PAIRS, llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"]
    for use in (lambda: list(causal), lambda: causal.save_authors(tmp_path)):
        with pytest.raises(AUSteerError, match="causal ranks do not fit"):
            use()
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_one_clear_line(ranks, tmp_path):
    (tmp_path / "file").touch()
    for save in (ranks.save, set_MFU(ranks, 3, 1.0).save):
        with pytest.raises(AUSteerError, match="cannot write"):
            save(tmp_path / "file" / "ffn.safetensors")


def test_a_failed_write_leaves_the_old_file_whole(ranks, tmp_path, monkeypatch):

    ranks.save(tmp_path / "ffn.safetensors")
    before = (tmp_path / "ffn.safetensors").read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("austeer.files.save_file", full_disk)
    with pytest.raises(AUSteerError, match="No space left"):
        ranks.save(tmp_path / "ffn.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["ffn.safetensors"]
    assert (tmp_path / "ffn.safetensors").read_bytes() == before


def test_the_fingerprint_sees_one_changed_weight(checkpoints):
    import rmodels

    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    before = fingerprint(model)
    assert (
        before == fingerprint(model) == fingerprint(rmodels.load(checkpoints["llama"], dtype="float32", device="cpu"))
    )
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 7] *= 1.001
    changed = fingerprint(model)
    assert changed != before
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.copy_(model.model.layers[2].mlp.down_proj.weight.flip(0))
    assert fingerprint(model) not in (before, changed)  # rows in another order are other AUs


# plans


def test_plan_round_trip(ranks, tmp_path):
    plan = set_MFU(ranks, 7, -1.25, tokens="generated") + Plan({}, {"layer": torch.eye(3, 48)}, "generated")
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again.aus() == plan.aus() and again.tokens == "generated" and again.header == plan.header
    assert torch.equal(again.scales["ffn"], plan.scales["ffn"]) and torch.equal(
        again.shifts["layer"], plan.shifts["layer"]
    )
    assert (tmp_path / "plan.safetensors").stat().st_size < 2000


def test_plans_add_up_and_report_conflicts(ranks):
    one, two = set_MFU(ranks, 5, 1.0), set_MFU(ranks, 3, -0.5)
    both = {au[:3] for au in one.aus()} & {au[:3] for au in two.aus()}
    assert {conflict[:3] for conflict in one.conflicts(two)} == both
    for *_, here, there in one.conflicts(two):
        assert there == (pytest.approx(-0.5 * here[0]), 0.0)
    assert len(one.conflicts(two)) == 3
    total = one + two
    assert torch.equal(total.scales["ffn"], one.scales["ffn"] + two.scales["ffn"])
    assert total.header["fingerprint"] == ranks.header["fingerprint"] and "alpha" not in total.header
    assert len(one + Plan({"layer": torch.ones(3, 48)})) == 5 + 144
    with pytest.raises(AUSteerError, match="cannot be added"):
        one + set_MFU(ranks, 5, 1.0, tokens="last")
    with pytest.raises(AUSteerError, match="different models"):
        one + Plan({"ffn": torch.ones(2, 48)})


def test_plans_of_two_models_do_not_add_up(ranks):
    other = set_MFU(ranks, 3, 1.0)
    other.header["fingerprint"] = "0" * 64
    with pytest.raises(AUSteerError, match="different models"):
        set_MFU(ranks, 3, 1.0) + other
    assert (Plan({"ffn": torch.zeros(3, 48)}) + set_MFU(ranks, 3, 1.0)).header["fingerprint"] == ranks.header[
        "fingerprint"
    ]
    assert bool(set_MFU(ranks, 3, 0.0))


def test_a_plan_prints_as_a_table(ranks):
    text = str(set_MFU(ranks, 4, 2.0))
    rows = text.splitlines()
    assert rows[0] == "4 atomic units, 1 of them with the sign turned over (gamma below -1), tokens: all"
    assert str(set_MFU(ranks, 4, 1.0)).startswith("4 atomic units, tokens: all"), "a gamma of -1 at most keeps signs"
    assert len([row for row in rows if row.startswith("ffn ")]) == 4 and "alpha: 2.0" in rows


def test_aus_whose_sign_a_plan_turns_over_are_counted():
    scales = torch.tensor([[0.0, 2.0, -0.5, -1.0], [-1.01, -19.0, 0.0, 50.0]])
    assert Plan({"ffn": scales}).inverted == 2, "a factor of 0 has no sign"
    assert Plan({"ffn": scales, "attention": scales[1:]}).inverted == 4
    assert Plan({}, {"ffn": -scales}).inverted == 0, "a shift is no factor"


def test_plan_refusals(ranks):
    plan = set_MFU(ranks, 4, 2.0)
    for call, message in (
        (lambda: plan.scale("attention", 0), "does nothing at site 'attention'"),
        (lambda: plan.scale("ffn", 3), "no layer 3"),
        (lambda: Plan({"ffn": torch.tensor([[torch.nan]])}), "inf or nan"),
    ):
        with pytest.raises(AUSteerError, match=message):
            call()
