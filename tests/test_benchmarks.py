"""The benchmarks run: in small, or from figures that were measured."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS

import rmodels
from austeer.fisher import measure_fisher
from austeer.neutral import neutral_text
from austeer.objective import Objective
from austeer.pairs import Pair, write_pairs
from eval.statistics import wilson
from MFU_screening import screen
from set_MFU import set_MFU

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch):
    """Let processes that a benchmark starts import this checkout's modules: the environment may be another's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def benchmark(monkeypatch):
    """Import a file of benchmarks/ as when it is run there."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def steering(benchmark, llama, monkeypatch):
    """Import benchmarks/steering.py with the vocabulary of the tiny model."""
    monkeypatch.setattr(benchmark("decoding"), "VOCABULARY", llama.config.vocab_size)
    return benchmark("steering")


def test_figures_are_shown_and_kept(benchmark, tmp_path, capsys):
    figures = benchmark("figures")
    figures_shown = {"ratio": 1 / 3, "a longer name": "1.2", "threads": 1}
    figures.show(figures_shown)
    assert capsys.readouterr().out == "ratio          0.333\na longer name  1.2\nthreads        1\n"
    figures.keep(figures_shown, None)
    figures.keep(figures_shown, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == figures_shown
    assert figures.markdown(["way", "at", "time"], [["live", "ffn", "1.0"], ["failed"]], words=2) == (
        "| way | at | time |\n|---|---|--:|\n| live | ffn | 1.0 |\n| failed |  |  |"
    )


def test_ways_to_steer_agree_and_are_timed(steering, llama, tmp_path, monkeypatch):
    """Check the folded checkpoint, too: upstream's class, with only the folded weights in memory of its own."""
    monkeypatch.setattr(steering, "BATCHES", (1, 2))
    monkeypatch.setattr(steering, "TURNS", {1: 3, 2: 3})
    models, way = {}, steering.way
    monkeypatch.setattr(steering, "way", lambda name, *rest: models.setdefault(name, way(name, *rest)))
    with steering.PATCHES:
        figures = steering.decoding(llama, tmp_path)
    assert all(list(ways) == list(steering.WAYS) for ways in figures.values())
    assert all(one["low"] <= one["ratio"] <= one["high"] for ways in figures.values() for one in ways.values())
    folded = models[steering.FOLDED]
    assert type(folded).__module__.startswith("transformers.")
    shared_memory = {weight.data_ptr() for weight in llama.state_dict().values()}
    own = {name for name, weight in folded.state_dict().items() if weight.data_ptr() not in shared_memory}
    assert own == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}
    with pytest.raises(AssertionError, match="folded checkpoint"):
        steering.check_agreement(models | {steering.FOLDED: models["upstream"]})


def test_the_table_has_every_way_that_was_measured(benchmark):
    figures = json.loads((RESULTS / "steering-cpu.json").read_text())
    for batch in figures["decoding"].values():
        batch["another way"] = {"ratio": 1.0, "low": 0.99, "high": 1.01, "milliseconds": 20.0}
    figures["decoding, peak MB"]["another way"] = figures["decoding, peak MB"]["upstream"]
    row = "| another way | " + "1.000 (0.990 to 1.010) | " * 3 + "1.00 |"
    assert row in benchmark("steering_report").table(figures).splitlines()


def test_memory_of_the_folded_checkpoint_is_that_of_loading_it(steering, llama, tmp_path, monkeypatch, capsys):
    steering.way(steering.FOLDED, llama, tmp_path)
    monkeypatch.setattr(steering, "build", lambda: pytest.fail("nothing else is loaded"))
    steering.print_peak(steering.FOLDED, tmp_path)
    assert float(capsys.readouterr().out) > -1  # MB; the kernel counts pages in batches


class FakeEngine:
    """Answer with the number of a request's plan; `ignored` ignores plans, as vLLM can."""

    def __init__(self, *, ignored=False):
        self.ignored, self.batches = ignored, []

    def generate(self, inputs, params, lora_request, use_tqdm):
        self.batches.append(lora_request)
        answers = [[0 if self.ignored or plan is None else plan] * 32 for plan in lora_request]
        assert len({tuple(prompt["prompt_token_ids"]) for prompt in inputs}) == len(lora_request)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for tokens in answers]


def test_requests_under_many_plans(benchmark, monkeypatch):
    engine = benchmark("engine")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    monkeypatch.setattr(engine.time, "process_time", iter(range(1000)).__next__)
    plans = list(range(1, 257))
    settings = {engine.UNSTEERED: engine.requests_under([], 256), "plans": engine.requests_under(plans, 256)}
    assert set(settings["plans"]) == set(plans) and settings[engine.UNSTEERED] == [None] * 256
    assert [engine.requests_under(plans[:16], 64).count(plan) for plan in (1, 16, 17)] == [4, 4, 0]
    fake = FakeEngine()
    assert engine.tokens_per_second(fake, settings, 2) == dict.fromkeys(settings, 256 * 32)  # in one tick of the clock
    assert fake.batches == [*settings.values()] * 3
    with pytest.raises(AssertionError, match="0 of 256 answers are changed"):
        engine.tokens_per_second(FakeEngine(ignored=True), settings, 1)


def test_every_engine_has_the_slots_that_its_figures_say(benchmark, monkeypatch, tmp_path):
    engine, started = benchmark("engine"), []

    def run_engine(path, args, at_once, *groups, **lora):
        started.append(
            (at_once, lora.get("max_loras"), [{len(group) for group in requests.values()} for requests in groups])
        )
        return [{name: 100.0 / (1 + len(set(group))) for name, group in requests.items()} for requests in groups]

    request = SimpleNamespace(LoRARequest=lambda name, number, folder: number)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr(engine, "run_engine", run_engine)
    adapters = [SimpleNamespace(folder=tmp_path / str(i), rank=10, targets=["o_proj"]) for i in range(engine.MANY)]
    figures = engine.measure(tmp_path, adapters, None)
    assert started == [(64, None, [{64}]), (64, 64, [{64}, {256}]), (256, 256, [{256}])]
    assert figures["64 plans / unsteered"] == pytest.approx(2 / 65)
    assert figures["256 plans over 64 slots / unsteered"] == pytest.approx(2 / 257)
    assert figures["256 plans at once / unsteered"] == pytest.approx(2 / 257)


class SimulatedBench:
    """Simulate 200 validation and 1000 test items: a strong plan is right on all, others on three of four."""

    task = SimpleNamespace(name="copa")
    validation, test = range(200), range(1000)

    def outcomes(self, items, plan=None):
        return [bool(item % 4) or plan == "32,8" for item in items]

    def under(self, plans, items):
        return [self.outcomes(items, plan) for plan in plans]


@pytest.fixture
def search(benchmark, monkeypatch):
    """Import benchmarks/search.py with a clock on which every search takes a second."""
    module = benchmark("search")
    monkeypatch.setattr(module.time, "process_time", iter(range(1000)).__next__)
    monkeypatch.setattr(module, "DRAWS", 3)
    return module


def test_searches_are_held_against_the_grid(search, monkeypatch):
    places = {}
    method = SimpleNamespace(
        momentum="causal", grid=search.METHODS["causal"].grid, plan=lambda ranks, settings: search.key_of(settings)
    )
    monkeypatch.setitem(search.METHODS, "simulated", method)
    places["copa ffn simulated"] = one = search.compare_searches(SimulatedBench(), "ffn", "simulated")
    grid, raced = one["searches"]["grid"], one["searches"]["racing"]
    assert grid["chosen"] == raced["chosen"] == "32,8" and grid["test"] == raced["validation"] == 1.0
    assert grid["interval"] == [pytest.approx(end, abs=1e-4) for end in wilson(1000, 1000)]
    racing = one["against the grid"]["racing"]
    assert racing["seconds"] == 1.0
    assert racing["item_runs"] == pytest.approx(raced["item_runs"] / 3000, abs=1e-4) and racing["item_runs"] <= 0.25
    assert racing["test"] == "inside" and search.against_the_grid(raced | {"test": 0.9}, grid)["test"] == "below"
    text = search.table(places)
    assert "| copa ffn simulated | racing | 32,8 | 1.000 | 1.000 | inside |" in text
    assert "racing's choices against the grid's interval: 1 inside, 0 above, 0 below" in text


def test_what_no_search_improves_has_the_accuracy_of_doing_nothing(search, monkeypatch):
    monkeypatch.setattr(SimulatedBench, "outcomes", lambda self, items, plan=None: [bool(item % 4) for item in items])
    for row in search.compare_searches(SimulatedBench(), "ffn", "causal")["searches"].values():
        assert row["chosen"] is None and row["validation"] == row["test"] == 0.75


@pytest.mark.parametrize("items", [3, 40])
def test_few_items_are_asked_in_one_batch_as_one_by_one(search, items):
    """Use a task whose answers have several tokens."""
    bench = search.Bench("tone")
    ranks = search.AURanks.load(search.RANKS / "tone" / "causal" / "ffn.safetensors")
    method = search.METHODS["causal"]
    plans = [method.plan(ranks, settings) for settings in method.grid("small")[::7]]
    subset = bench.validation[:items]
    outcomes = bench.under(plans, subset)
    assert outcomes == [bench.outcomes(subset, plan) for plan in plans] and len(set(map(tuple, outcomes))) > 1


def test_a_part_that_is_not_run_is_kept(benchmark, monkeypatch, tmp_path, capsys):
    search, out = benchmark("search"), tmp_path / "search.json"
    out.write_text(json.dumps({"searches": {}, "batches": {"old": {"8": 1.0}}}))
    monkeypatch.setattr(search, "batches", lambda: iter([("copa", {8: 1.5}), ("tone", {8: 2.5})]))
    monkeypatch.setattr(sys, "argv", ["search.py", "--only", "batches", "--out", str(out)])
    search.main()
    saved = json.loads(out.read_text())
    assert saved["searches"] == {} and saved["batches"] == {"copa": {"8": 1.5}, "tone": {"8": 2.5}}
    assert "batches: tone" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_gpu_benchmark_on_a_cpu(tmp_path, shape):
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--shape",
        shape,
        "--device",
        "cpu",
        "--n-prompts",
        "8",
        "--n-pairs",
        "8",
    ]
    subprocess.run([*command, "--out", tmp_path / "out.json"], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["screening"]["pairs/s"] > 0 and figures["one-token answers"]["prompts/s"] > 0
    for batch in (1, 32):
        for mode in ("eager", "compiled"):
            ways = figures[f"decoding, batch {batch}, {mode}"]
            assert {"upstream", "idle", "live, attention", "live, ffn", "hot patch", "floor ms"} <= set(ways)


@pytest.mark.slow
def test_table_and_picture_of_the_committed_figures(tmp_path):
    command = [sys.executable, "benchmarks/steering_report.py", RESULTS / "steering-cpu.json", tmp_path / "picture.png"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "| hot patch |" in text and (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_guide_to_costs_shows_the_committed_figures():
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    figures = json.loads((ROOT / "benchmarks" / "results" / "steering-cpu.json").read_text())
    added = figures["peers"]["a vector added to every layer"]
    for label, ways, measured in (
        ("upstream, against itself", ["upstream again"], figures["decoding"]),
        ("idle gates", ["idle"], figures["decoding"]),
        ("folded checkpoint", ["folded checkpoint"], figures["decoding"]),
        ("hot patch", ["hot patch"], figures["decoding"]),
        ("live, ffn / attention", ["live, ffn", "live, attention"], figures["decoding"]),
        ("forward hooks", ["forward hooks"], figures["decoding"]),
        ("LoRA adapter by PEFT", ["LoRA by PEFT"], figures["decoding"]),
        ("a vector added to every layer", ["ours, live", "repeng", "steering-vectors"], added),
    ):
        row = next(line for line in lines if line.startswith(f"| {label}")).split("|")[2:5]
        for cell, batch in zip(row, ("1", "8", "32"), strict=True):
            assert cell.strip() == " / ".join(f"{measured[batch][way]['ratio']:.2f}" for way in ways), label


def test_the_guide_to_serving_shows_the_committed_figures():
    guide = (ROOT / "docs" / "serving.md").read_text()
    figures = json.loads((ROOT / "benchmarks" / "results" / "engine-cpu.json").read_text())
    for label, measured in (
        ("unsteered, again", "unsteered again"),
        ("1 plan for all requests", "1 plans"),
        ("16 distinct plans", "16 plans"),
        ("64 distinct plans, one each", "64 plans"),
        ("256 distinct plans over 64 slots", "256 plans over 64 slots"),
        ("256 distinct plans at once, 256 slots", "256 plans at once"),
        ("the engine started without adapters", "lora off"),
    ):
        assert f"| {label} | {figures[f'{measured} / unsteered']:.2f} |" in guide


def test_gates_by_structure_and_of_a_file_are_timed_on_equal_models(benchmark, llama):
    ways = benchmark("structure").ways(llama)
    ids = torch.arange(3, 40)[None]
    logits = {name: way(ids).logits for name, way in ways.items()}
    for kind in ("family file", "structure"):
        assert torch.equal(logits[f"{kind}, idle"], logits["upstream"])
        assert torch.equal(logits[f"{kind}, live"], logits["family file, live"])
    assert not torch.equal(logits["family file, live"], logits["upstream"])


def test_predicted_and_measured_cost_of_plans(benchmark, checkpoints, tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    command = ["--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    command += ["--site", "neuron", "--k", "20", "0", "--kl", "0.003", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["budget.py", *command])
    benchmark("budget").main()
    figures = json.loads((tmp_path / "out.json").read_text())
    given, chosen = figures["plans"]
    assert (given["k"], given["default k"], chosen["default k"]) == (20, False, True)
    for row in figures["plans"]:
        assert row["ratio"] == row["measured"] / row["predicted"] and 0.3 < row["ratio"] < 3
        assert row["corrected"] == pytest.approx(0.003, rel=0.1) and row["forwards"] <= 5
    assert "2 within 10 % after correction" in capsys.readouterr().out


@pytest.mark.slow
def test_estimates_are_judged_on_pairs_that_are_left_over(benchmark, checkpoints, tmp_path, monkeypatch, capsys):
    estimates, drawn = benchmark("estimates"), []

    def task(name, n_pairs, pairs_draw, **_):
        drawn.append((name, n_pairs, pairs_draw))
        pairs = [Pair(*pair) for pair in PAIRS]
        used, left_over = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        return SimpleNamespace(pairs=used, groups=[pair.prompt for pair in used], left_over=left_over)

    monkeypatch.setattr(estimates, "paper_task", task)
    command = ["--model", str(checkpoints["llama"]), "--data_name", "copa-choices", "--device", "cpu", "--n-pairs", "9"]
    command += ["--site", "neuron", "--draws", "3", "4", "--kl", "0.003", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["estimates.py", *command])
    estimates.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert drawn == [("copa-choices", 9, 3), ("copa-choices", 9, 4)] and len(rows) == 2 * len(estimates.ESTIMATES)
    model, tokenizer = rmodels.load(checkpoints["llama"], device="cpu"), rmodels.load_tokenizer(checkpoints["llama"])
    ours = task("", 9, 3)
    ranks = screen(ours.pairs, model, tokenizer, ["neuron"], momentum="causal-tempered", progress=False)["neuron"]
    fisher = measure_fisher(model, ["neuron"], neutral_text(tokenizer), progress=False)
    plan = set_MFU(ranks, kl=0.003, fisher=fisher, model=model, estimate="bound", z=1.0)
    tau = ranks.header["tau"]
    before, after = (Objective(model, tokenizer, ours.left_over, None).log_odds(gates) for gates in ({}, plan.scales))
    gain = sum(
        math.log1p(math.exp(-a / tau)) - math.log1p(math.exp(-b / tau)) for a, b in zip(before, after, strict=True)
    )
    points = 100 * sum(int(b > 0) - int(a > 0) for a, b in zip(before, after, strict=True)) / len(before)
    row = next(row for row in rows if row["estimate"] == "bound, z 1")
    assert row["objective"] == pytest.approx(gain / len(before), rel=1e-3) and row["pairs left over"] == len(before)
    assert row["accuracy"] == pytest.approx(points)
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(f"| {name} |" for name in estimates.ESTIMATES)) for line in table) == 4
