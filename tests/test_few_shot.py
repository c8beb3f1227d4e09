"""Few-shot prompts: which examples, how many fit, and a row of the comparison whose draws are a band."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PAIRS
from one_cell import computed
from test_rival_methods import evidence_of

from austeer.methods.few_shot import Examples, FewShot
from austeer.pairs import Pair
from experiments import plots, report
from experiments.bench import BENCHES
from experiments.compare import LABELS, main

ITEMS = [Pair(f"Is {name} new?", " yes", " no") for name in ("it", "the lamp")]


def examples_of(prompt: str) -> list[str]:
    return prompt.split("\n\n")[:-1]


@pytest.fixture
def prepared(llama, tokenizer):
    return Examples([Pair(*pair) for pair in PAIRS], tokenizer, 10_000)


def test_examples_are_right_answers_of_the_pairs(prepared):
    right = {prompt + answer for prompt, answer, _ in PAIRS}
    items, said = FewShot().asked(prepared, {"examples": 4}, ITEMS)
    assert said == {"examples": 4, "prompts with fewer": 0}
    for item, before in zip(items, ITEMS, strict=True):
        assert item[1:] == before[1:] and item.prompt.endswith("\n\n" + before.prompt)
        shown = examples_of(item.prompt)
        assert len(set(shown)) == 4 and set(shown) <= right
    assert examples_of(items[0].prompt) == examples_of(items[1].prompt)


def test_draws_differ_and_larger_ones_hold_the_smaller(prepared):
    shown = {
        (number, draw): examples_of(FewShot().asked(prepared, {"examples": number}, ITEMS[:1], draw)[0][0].prompt)
        for number in (4, 8, 16)
        for draw in (0, 1)
    }
    assert shown[4, 0] == shown[8, 0][:4] == shown[16, 0][:4] and shown[8, 0] == shown[16, 0][:8]
    assert shown[4, 0] != shown[4, 1] and set(shown[16, 0]) == set(shown[16, 1])


def test_examples_that_do_not_fit_are_dropped(prepared, tokenizer, capsys):
    long = Pair("Is it " + "very " * 20 + "new?", " yes", " no")
    full, _ = FewShot().asked(prepared, {"examples": 4}, [ITEMS[0]])
    prepared.room = len(tokenizer(full[0].prompt)["input_ids"])  # just enough for the short prompt
    items, said = FewShot().asked(prepared, {"examples": 4}, [ITEMS[0], long])
    assert items[0].prompt == full[0].prompt and said == {"examples": 4, "prompts with fewer": 1}
    assert examples_of(items[1].prompt) == examples_of(full[0].prompt)[:2]
    assert len(tokenizer(items[1].prompt)["input_ids"]) <= prepared.room
    assert "4 examples do not fit into the context with 1 of 2 prompts" in capsys.readouterr().err
    prepared.room = 1
    assert FewShot().asked(prepared, {"examples": 4}, [long])[0] == [long], "without room the prompt stays as it is"


def test_few_pairs_are_all_shown(llama, tokenizer):
    prepared = FewShot().prepare(evidence_of(llama, tokenizer, PAIRS[:3], "prompt"))
    _, said = FewShot().asked(prepared, {"examples": 16}, ITEMS[:1])
    assert said["examples"] == 3 and FewShot().plan(prepared, {"examples": 16}) is None
    assert prepared.room == 256 - max(len(tokenizer(answer)["input_ids"]) for _, answer, _ in PAIRS[:3])


def test_it_runs_as_a_row(tmp_path, monkeypatch):
    """The chosen number is the best on validation, and its answers are those to the prompts with examples."""
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 60)
    BENCHES.close()
    few = {"task": "svamp", "limit": 80}
    rows = [computed(tmp_path, **few, method="few-shot", site="prompt", draw=draw) for draw in (0, 1)]
    vanilla = computed(tmp_path, **few, method="vanilla")
    assert rows[0]["outcomes"] != rows[1]["outcomes"] != vanilla["outcomes"]
    for row in rows:
        best = max(row["grid_scores"].values())
        assert list(row["grid_scores"]) == ["4", "8", "16"] and row["grid_scores"][row["chosen"]] == best
        assert row["receipt"]["examples"] == int(row["chosen"]) and row["touched"] == 0
    text = report.table([vanilla, *rows], LABELS)
    assert "| few-shot prompts, 2 draws | | | |" in text and "(min / median / max)" in text
    scores = {"svamp": {"attention": torch.zeros(4, 8).numpy()}}
    causal = computed(tmp_path, **few, method="causal", site="attention", ks=[4], alphas=[1.0])
    plots.comparison({"svamp": [vanilla, *rows, causal]}, scores, LABELS, "causal", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with_bands = report.table([vanilla, *rows, causal], LABELS)
    p, adjusted = with_bands.splitlines()[-2 if "few-shot" in with_bands.splitlines()[-1] else -1].split("|")[-3:-1]
    assert p == adjusted, "draws of few-shot are a band: Holm's family holds causal alone"
    BENCHES.close()


def test_the_command_line_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 60)
    BENCHES.close()
    command = ["--data_name", "svamp", "--method", "few-shot", "--limit", "20", "--draws", "2", "--jobs", "1"]
    main([*command, "--device", "cpu", "--results", str(tmp_path), "--path", str(tmp_path / "ranks")])
    records = [json.loads(path.read_text()) for path in Path(tmp_path / "records").glob("svamp-prompt-few-shot-*.json")]
    assert {record["draw"] for record in records} == {0, 1} and all(record["n"] == 20 for record in records)
    BENCHES.close()
