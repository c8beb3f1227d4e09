"""Side effects at the same KL: counts against the records of cells, and the three gates."""

import math

import pytest
import torch
from one_cell import store_in

from experiments.bench import BENCHES
from experiments.cell import at_kl, bench_of, cell_of
from experiments.costs import neutral_of
from experiments.equal_kl import Unreached
from experiments.run_cell import run_cell
from paper.studies import side_effects

FLAT = {"model": "embedded", "device": "cpu", "task": "copa", "limit": 40, "n_pairs": 60}
PARAMS = {
    "level": 0.03, "n": 40, "tasks": ["boolq"],
    "methods": {"ours": {"method": "causal-fitted", "site": "attention"}, "CAA": {"method": "caa", "site": "layer"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    store = store_in(tmp_path_factory.mktemp("side-effects"))
    bench = BENCHES.open(*bench_of(**FLAT), store)
    return bench, store, side_effects.measure(bench, PARAMS, progress=False)


@pytest.mark.slow
def test_the_task_itself_is_as_its_record_says(measured):
    _, store, result = measured
    for label, method in PARAMS["methods"].items():
        cell = at_kl(cell_of(**FLAT, **method), 0.03)
        record = run_cell(cell, BENCHES.open(cell.model, cell.task, store))
        found = result["methods"][label]
        assert found["sets"]["itself"][:3] == [record["gained"], record["lost"], 40]
        assert found["kl"] == pytest.approx(record["kl"]["measured"])


@pytest.mark.slow
def test_other_tasks_and_wordings_are_asked(measured):
    _, _, result = measured
    sets = ["itself", "worded: an instruction in front", "worded: in lower case", "worded: as something said", "boolq"]
    for found in result["methods"].values():
        assert list(found["sets"]) == sets, "no prompt of the embedded task has a link to reword"
        assert all(n == 40 for _, _, n, _ in found["sets"].values()) and 0 <= found["worse"] <= 1


@pytest.mark.slow
def test_perplexity_is_of_the_second_halves_of_the_text(measured):
    bench, *_ = measured
    texts = neutral_of(bench).part("report")
    half, nats, count = texts.shape[1] // 2, 0.0, 0
    for text in texts:
        logp = bench.model(text[None]).logits[0].log_softmax(-1)
        nats -= float(logp[half - 1 : -1].gather(1, text[half:, None]).sum())
        count += len(text) - half
    with torch.inference_mode():
        assert side_effects._perplexity(bench, None) == pytest.approx(math.exp(nats / count), rel=1e-4)


SETS = {"itself": [20, 4, 100, 0.002], "worded: a": [15, 3, 100, 0.01], "boolq": [3, 5, 100, 0.7]}
FOUND = {"kl": 0.03, "perplexity": 1.03, "worse": 0.3, "sets": SETS}


def test_the_three_gates():
    assert side_effects.gates(FOUND) == {"controllable": True, "harmless": True, "robust": True}
    assert not side_effects.gates(FOUND | {"perplexity": 1.06})["harmless"]
    assert not side_effects.gates(FOUND | {"sets": SETS | {"boolq": [1, 20, 100, 0.0001]}})["harmless"]
    assert side_effects.gates(FOUND | {"sets": SETS | {"boolq": [20, 1, 100, 0.0001]}})["harmless"], (
        "a gain does no harm"
    )
    assert not side_effects.gates(FOUND | {"sets": SETS | {"worded: a": [8, 1, 100, 0.04]}})["robust"]
    lost = side_effects.gates(FOUND | {"sets": SETS | {"itself": [4, 20, 100, 0.002]}})
    assert not lost["controllable"] and not lost["robust"]


def test_picture_and_note(tmp_path):
    result = {"task": "copa", "level": 0.03, "methods": {"ours": FOUND, "CAA": FOUND | {"perplexity": 1.5, "worse": None}},
              "unreached": {"STA": "it changes nothing"}}  # fmt: skip
    side_effects.draw(result, PARAMS, tmp_path / "p.png", None)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    text = side_effects.note(result, PARAMS)
    assert "ours: 0.03 nats" in text and "in 30 % of items; passes controllable, harmless, robust." in text
    assert "passes controllable, robust." in text and "STA is left out: it changes nothing." in text


@pytest.mark.slow
def test_a_method_that_reaches_nothing_is_left_out(measured, monkeypatch):
    bench, *_ = measured

    def refuse(*_):
        raise Unreached("it changes nothing")

    monkeypatch.setattr(side_effects.RunAtKL, "at_level", refuse)
    params = PARAMS | {"n": 4, "methods": {"ours": PARAMS["methods"]["ours"]}}
    result = side_effects.measure(bench, params, progress=False)
    assert result["methods"] == {} and result["unreached"] == {"ours": "it changes nothing"}


@pytest.mark.slow
def test_other_items_or_another_text_make_another_record(measured):
    bench, *_ = measured
    key = side_effects.depends_on(bench, PARAMS)
    assert key == side_effects.depends_on(bench, PARAMS) and set(key["items_of_others"]) == {"boolq"}
    assert key["neutral"] == neutral_of(bench).hash
