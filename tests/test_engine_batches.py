"""Comparisons whose answers come from an engine are the live ones, in one batch per round. The engine here is a stand-in
that steers live by the plan beside each adapter; tests/test_vllm.py has the real one."""

import json
import re
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from samples import without_chance, write_datasets

import main
import rmodels
from austeer.errors import AUSteerError
from austeer.methods import austeer
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from eval.tasks.open_text import BPO
from experiments import plots as figures
from experiments import records
from experiments.bench import BENCHES
from experiments.engines import answering
from experiments.engines import vllm_batches as engine_batches
from experiments.engines import vllm_engine as engine_vllm


class StandIn:
    """Stand in for VLLMEngine."""

    started, asked = [], []  # the rank of each engine; per call, how many prompts under how many adapters

    def __init__(self, checkpoint, *, max_lora_rank, dtype, **settings):
        self.model = rmodels.load(checkpoint, dtype=dtype, device="cpu")
        self.tokenizer, self.max_lora_rank = rmodels.load_tokenizer(checkpoint), max_lora_rank
        self.started.append(max_lora_rank)

    def answers(self, prompts, generation, adapters):
        self.asked.append((len(prompts), len(set(adapters))))
        answers = {}
        for adapter in dict.fromkeys(adapters):
            indices = [index for index, other in enumerate(adapters) if other == adapter]
            plan = Plan.load(adapter / "plan.safetensors") if adapter else None
            with steer(self.model, plan) if plan else nullcontext():
                steered_answers = LiveAnswerer(self.model, self.tokenizer).answer(
                    [prompts[index] for index in indices], generation
                )
            answers.update(zip(indices, steered_answers, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def stop(self):
        del self.model


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(engine_batches, "VLLMEngine", StandIn)
    monkeypatch.setattr(answering, "installed", lambda: "stand-in 1")
    monkeypatch.setattr(StandIn, "started", [])
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(figures, "comparison", lambda *of: None)  # a second each
    yield StandIn
    BENCHES.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(checkpoints, tmp_path):
    BENCHES.close()
    (tmp_path / "model").mkdir()
    for file in checkpoints["llama"].iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return tmp_path / "model"


def run(data, folder, results, *more):
    """Run a comparison. Return its exit code, and its records by method."""
    code = main.main(
        ["--model", str(folder), "--data-dir", str(data), "--results", str(results), "--path", str(folder / "ranks"),
         "--applied_module", "attention", "--draws", "1", "--device", "cpu", *more]
    )  # fmt: skip
    rows = (json.loads(file.read_text()) for file in (results / "records").glob("*.json"))
    return code, {row["method"]: row for row in rows}


def words(results):
    """Return all answers by cell, as (prompt, answer, log-probabilities), in whatever batches they came."""
    rows_by_cell = {}
    for file in (results / "answers").glob("*.jsonl"):
        cell = re.match(r"(.*)-[0-9a-f]{12}-", file.name)[1]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows_by_cell.setdefault(cell, []).extend((row["prompt"], row["answer"], row["options"]) for row in rows)
    return {cell: sorted(rows) for cell, rows in sorted(rows_by_cell.items())}


def same_words(one, other):
    assert one and one.keys() == other.keys()
    for cell, rows in one.items():
        assert [row[:2] for row in rows] == [row[:2] for row in other[cell]]
        for row, other_row in zip(rows, other[cell], strict=True):
            assert row[2] == pytest.approx(other_row[2], abs=1e-4)
        prompts, distinct = {row[0] for row in rows}, {(row[0], *(round(value, 2) for value in row[2])) for row in rows}
        assert len(distinct) > len(prompts) or not ("causal" in cell and rows[0][2])  # grid points differ


RESULT = ("outcomes", "columns", "measures", "extras", "settings", "grid_scores", "grid_outcomes", "asked", "n")


def equal(one, other):
    assert one and set(one) == set(other)
    for name, row in one.items():
        assert [row.get(key) for key in RESULT] == [other[name].get(key) for key in RESULT]
        assert row["id"] != other[name]["id"] and (row["engine"], other[name]["engine"][:10]) == ("live", "stand-in 1")


def test_a_comparison_by_an_engine_is_the_live_one(data, folder, engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(austeer.KS, "full", (4,))
    monkeypatch.setitem(austeer.ALPHAS, "full", (0.0, 1.0, 4.0))
    command = ["--data_name", "copa", "--method", "causal", "--limit", "6"]
    _, live = run(data, folder, tmp_path / "live", *command)
    _, by_engine = run(data, folder, tmp_path / "engine", *command, "--engine", "vllm")
    equal(live, by_engine)
    same_words(words(tmp_path / "live"), words(tmp_path / "engine"))
    held_out = len(records.unpack(live["vanilla"]["validation"]))
    assert (3 * held_out, 3) in engine.asked  # the whole grid at once; alpha 0 is the model as it is
    assert engine.started == [16]
    assert "answers: stand-in 1" in capsys.readouterr().out and list((tmp_path / "engine").glob("*-vllm.md"))

    # resumed: what was answered is not asked again, and without anything to ask no engine starts
    BENCHES.close()
    files = {file: file.read_bytes() for file in (tmp_path / "engine" / "answers").rglob("*.jsonl")}
    (tmp_path / "engine" / "records" / f"{by_engine['causal']['id']}.json").unlink()
    _, again = run(data, folder, tmp_path / "engine", *command, "--engine", "vllm")
    assert without_chance(again["causal"]) == without_chance(by_engine["causal"]) and engine.started == [16]
    torn = next(file for file in files if "3-points" in file.name)
    torn.write_bytes(files[torn][: len(files[torn]) // 2])
    (tmp_path / "engine" / "records" / f"{by_engine['causal']['id']}.json").unlink()
    run(data, folder, tmp_path / "engine", *command, "--engine", "vllm")
    assert {file: file.read_bytes() for file in files} == files and engine.asked[-1] == (3 * held_out, 3)


def test_likelihoods_stay_the_models_own(data, folder, engine, tmp_path, monkeypatch):
    """Check BPO, which chooses by likelihoods and answers only the test in words."""
    monkeypatch.setattr(BPO, "new_tokens", {"": 4})
    command = ["--data_name", "bpo", "--method", "causal", "--k", "60", "--alpha", "1", "20", "--limit", "6"]
    _, live = run(data, folder, tmp_path / "live", *command)
    _, by_engine = run(data, folder, tmp_path / "engine", *command, "--engine", "vllm")
    equal(live, by_engine)
    assert set(engine.asked) == {(6, 1)}
    assert len({*live["causal"]["grid_outcomes"].values()}) > 1  # grid points differ


def test_a_plan_that_is_no_adapter_fails_its_cell_alone(data, folder, engine, tmp_path, capsys):
    command = ["--data_name", "copa", "--method", "caa", "random", "--k", "4", "--alpha", "1", "--limit", "3"]
    code, rows = run(data, folder, tmp_path / "results", *command, "--engine", "vllm")
    failures = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FAILED")]
    assert code == 1 and set(rows) == {"vanilla", "prompt-only", "random"}
    assert len(failures) == 1 and "a LoRA adapter has no bias to hold it; steer live" in failures[0]
    receipt = rows["random"]["receipt"]
    assert receipt["aus"] == 4 and 1 <= receipt["rank"] <= 4 and 1 <= receipt["modules"] <= 3


def test_a_higher_rank_starts_the_engine_anew(folder, engine, monkeypatch):
    monkeypatch.setattr(engine_batches, "SLOTS", 1)
    live = rmodels.load(folder, dtype="float32", device="cpu")
    for touched, rank in ((3, 16), (20, 32), (5, 32)):
        scales = torch.zeros(rmodels.site_shape(live, "attention"))
        scales[1, :touched] = 1.0
        plan = Plan({"attention": scales})
        with engine_batches.vllm_answerer(live, None, [None, None, plan, plan]) as served:
            answers = served.answer(["a", "b"] * 2, Generation(2))
        assert len(answers) == 4 and engine.started[-1] == rank
    assert engine.started == [16, 32] and engine.asked == [(4, 2)] * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quantization", "4bit", "--batch-size", "2"], "leave out --quantization, --batch-size"),
        (["--attn", "eager"], "leave out --attn"),
        (["--device", "cuda:1"], "leave out --device cuda:1"),
    ],
)
def test_what_an_engine_does_not_go_with(more, message, data, folder, engine, tmp_path):
    with pytest.raises(AUSteerError, match=message):
        run(data, folder, tmp_path, "--data_name", "copa", "--engine", "vllm", *more)


def test_without_vllm(data, folder, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engine_vllm, "version", missing)
    with pytest.raises(
        AUSteerError, match=r"^vLLM is not installed here: run bash scripts/setup-vllm.sh.*main.py ...$"
    ):
        run(data, folder, tmp_path, "--data_name", "copa", "--engine", "vllm")
