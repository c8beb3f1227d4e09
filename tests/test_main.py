"""main.py as a user runs it: the comparison, resuming, one's own pairs, and wrong inputs."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHARED, needs_shared
from one_cell import attempted, bench_for, computed, embedded_cell
from samples import without_chance

import main
from austeer.errors import AUSteerError
from austeer.methods import austeer
from austeer.pairs import read_pairs
from austeer.plan import Plan
from experiments import compare as comparison
from experiments import records, report, run_cell
from experiments.bench import BENCHES

ROOT = Path(__file__).parents[1]
QUICK = ["--limit", "60", "--draws", "2", "--jobs", "1", "--k", "16", "--alpha", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def fresh_cells():
    BENCHES.close()
    yield
    BENCHES.close()


def rows_of(folder):
    return [json.loads(file.read_text()) for file in sorted((folder / "records").glob("*.json"))]


def test_the_comparison_and_its_resumption(tmp_path, capsys, monkeypatch):
    command = ["--data_name", "svamp", "--applied_module", "attention", *QUICK, "--results", str(tmp_path)]
    command += ["--path", str(tmp_path / "ranks")]
    main.main(command)
    output = capsys.readouterr().out
    for text in (
        "| vanilla |",
        "| prompt only |",
        "random AUs, Head, 2 draws",
        "causal AUSteer, Head",
        "published",
        "beat",
    ):
        assert text in output
    (parts, picture), rows = sorted(tmp_path.glob("*.png")), rows_of(tmp_path)
    assert picture.stat().st_size > 20_000 and parts.stat().st_size > 10_000 and len(rows) == 8
    assert parts.name == "embedded-svamp-parts.png" and "fitted offset, nothing steered" in output
    by_method = {row["method"]: row for row in rows}
    assert all(row["n"] == 60 == len(records.unpack(row["outcomes"])) for row in rows)
    assert all(sum(records.unpack(row["outcomes"])) == row["right"] for row in rows)
    causal, vanilla = by_method["causal"], by_method["vanilla"]
    assert causal["right"] - vanilla["right"] == causal["gained"] - causal["lost"]
    assert by_method["prompt-only"]["right"] >= 54

    monkeypatch.setattr("experiments.store.Store.write", None)  # a finished cell must not be computed again
    BENCHES.close()
    main.main(command)
    assert capsys.readouterr().out.split("| vanilla |")[1] == output.split("| vanilla |")[1]
    monkeypatch.undo()
    (tmp_path / "records" / f"{causal['id']}.json").unlink()
    main.main(command)
    again = {row["method"]: row for row in rows_of(tmp_path)}["causal"]
    assert without_chance(again) == without_chance(causal)


def test_the_search_is_on_validation_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(austeer.KS, "small", (4, 16))
    monkeypatch.setitem(austeer.ALPHAS, "small", (0.5, 4.0))
    record = computed(tmp_path, task="svamp", method="causal", site="attention", limit=50)
    assert set(record["grid_scores"]) == {"4,0.5", "4,4", "16,0.5", "16,4"}
    best = max(record["grid_scores"].values())
    assert record["grid_scores"][record["chosen"]] == best
    assert record["grid"][0] == {"k": 4, "alpha": 0.5} and record["n"] == 50


def test_nothing_is_done_where_nothing_beats_vanilla_on_validation(tmp_path, monkeypatch):
    monkeypatch.setitem(austeer.KS, "small", (1,))
    monkeypatch.setitem(austeer.ALPHAS, "small", (0.0, 0.0001))
    record = computed(tmp_path, task="copa", method="causal", site="ffn", limit=40)
    vanilla = computed(tmp_path, task="copa", method="vanilla", limit=40)
    assert record["settings"] is None and record["outcomes"] == vanilla["outcomes"] and record["p"] == 1.0


def test_a_steered_test_has_a_receipt_and_a_silent_no_op_fails(tmp_path, monkeypatch):
    few = {"task": "copa", "method": "causal", "site": "ffn", "limit": 20, "n_pairs": 40}
    record = computed(tmp_path, **few, ks=[4], alphas=[2.0])
    assert record["receipt"]["aus"] == record["touched"] == 4 and record["receipt"]["positions"] > 20
    idle = attempted(tmp_path, **few, ks=[4], alphas=[0.0])
    assert idle["receipt"]["aus"] == idle["touched"] == 0
    monkeypatch.setattr(
        austeer.Causal, "plan", lambda self, ranks, point, draw=0: Plan({"ffn": torch.zeros(ranks.score.shape)})
    )
    lost = attempted(tmp_path, **few, ks=[5], alphas=[2.0])
    assert "the plan steered nothing ({'aus': 0" in lost["failed"]


def test_records_are_named_by_their_key(tmp_path, monkeypatch):
    cell = embedded_cell(task="svamp", method="causal", site="ffn", limit=30)
    one = run_cell.cell_key(cell, bench_for(tmp_path, task="svamp", limit=30))
    names = {records.record_id(one)}
    for change in ({"draw": 1}, {"site": "attention"}, {"fingerprint": "x"}, {"grid": [[1], [1]]}, {"items_hash": "y"}):
        names.add(records.record_id({**one, **change}))
    monkeypatch.setattr(run_cell, "code_hash", lambda *roots, cut: "other code")
    names.add(records.record_id(run_cell.cell_key(cell, bench_for(tmp_path, task="svamp", limit=30))))
    assert len(names) == 7


def test_outcomes_pack_and_unpack():
    for outcomes in ([], [True], [False] * 9, [False, True, True] * 11):
        assert records.unpack(records.pack(outcomes)) == outcomes


def test_the_verdict_says_when_controls_are_not_beaten():
    def row(method, right, draw=0):
        return {"method": method, "site": "ffn", "right": right, "n": 100, "draw": draw, "p": 0.001, "measure": "accuracy",
                "test_split": "test", "gained": 0, "lost": 0, "options": {}}  # fmt: skip

    rows = [
        {**row("vanilla", 50), "site": None},
        row("random", 70),
        row("random", 55, 1),
        row("published", 60),
        row("causal", 80),
    ]
    published, causal = report.verdict(rows, comparison.LABELS)
    assert "does NOT beat every control (1 of 2 random AUs gain less)" in published
    assert "it beats every control (2 of 2 random AUs gain less)" in causal
    alone = report.verdict([rows[0], rows[4]], comparison.LABELS)
    assert alone == ["causal AUSteer, FFN: +30.0 points; no controls were run"]
    table = report.table(rows, comparison.LABELS)
    assert "| random AUs, FFN, 2 draws | | | | +5.0 / +12.5 / +20.0 (min / median / max) | | | |" in table
    assert "| causal AUSteer, FFN |  |  | 80.0 [71.1, 86.7] | +30.0 | 0 / 0 | 0.001 | 0.002 |" in table


def own_pairs(path, count=160):
    drawn, lines = random.Random(0), {}
    names, places = (
        ["Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Tim", "Sue"],
        ["park", "house", "garden", "school", "beach"],
    )
    while len(lines) < count:
        a, b = drawn.sample(names, 2)
        prompt = f"{a} and {b} played in the {drawn.choice(places)} on day {drawn.randint(2, 9)}. {a} felt so"
        lines[prompt] = {
            "prompt": prompt,
            "positive": drawn.choice([" happy", " glad"]),
            "negative": drawn.choice([" sad", " angry"]),
        }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    return list(lines.values())


def test_a_users_own_pairs_from_json_lines_and_csv(checkpoints, tmp_path, capsys, monkeypatch):
    lines = own_pairs(tmp_path / "mine.jsonl")
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["good", "q", "bad"])
        writer.writeheader()
        writer.writerows({"q": x["prompt"], "good": x["positive"], "bad": x["negative"]} for x in lines)
    command = ["--model", str(checkpoints["qwen3"]), *QUICK, "--draws", "1", "--results", str(tmp_path / "results")]
    command += ["--path", str(tmp_path / "ranks"), "--pairs"]
    tables = []
    for more in (["mine.jsonl"], ["mine.csv", "--fields", "q", "good", "bad"]):
        main.main([*command, str(tmp_path / more[0]), *more[1:]])
        tables.append(capsys.readouterr().out.split("## mine")[1].split("picture:")[0])
        assert len(list((tmp_path / "results").glob("*.png"))) == 1
        monkeypatch.setattr("experiments.store.Store.write", None)  # the same pairs name the same cells, which are done
    assert tables[0] == tables[1] and "| method | log-odds | perplexity |" in tables[0]
    assert "right answer preferred" in tables[0]


@needs_shared
@pytest.mark.slow
def test_happy_against_sad_on_a_model_trained_by_others(tmp_path):
    own_pairs(tmp_path / "mood.jsonl", 240)
    command = [
        "--model",
        str(SHARED / "models" / "stories260K"),
        "--pairs",
        str(tmp_path / "mood.jsonl"),
        "--device",
        "cpu",
    ]
    command += [
        "--k",
        "20",
        "--alpha",
        "1",
        "--draws",
        "3",
        "--results",
        str(tmp_path),
        "--path",
        str(tmp_path / "ranks"),
    ]
    main.main(command)
    rows = {(row["method"], row["site"], row["draw"]): row for row in rows_of(tmp_path)}
    vanilla = rows["vanilla", None, 0]
    for site in ("attention", "ffn"):
        causal, published = rows["causal", site, 0], rows["published", site, 0]
        assert causal["measures"]["log-odds"]["value"] > vanilla["measures"]["log-odds"]["value"] + 0.5
        assert causal["measures"]["log-odds"]["value"] > published["measures"]["log-odds"]["value"]
        assert causal["measures"]["log-odds"]["value"] > max(
            rows["random", site, draw]["measures"]["log-odds"]["value"] for draw in range(3)
        )
        assert causal["extras"]["perplexity"] < 1.5 * vanilla["extras"]["perplexity"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--pairs", "x.jsonl"], "--pairs needs --model"),
        (["--model", "some/model"], "--model needs --data_name"),
        (["--chat", "--protocol", "paper"], "--chat, --protocol paper: for the paper's tasks only"),
        (
            ["--model", "x", "--data_name", "copa", "--protocol", "paper", "--method", "causal"],
            "not in the authors' code",
        ),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--method", "sadi-head", "--option", "iti.std=n"], "--option iti.std: iti does not run; add it to --method"),
        (["--limit", "0"], "--limit must be at least 1"),
        (
            ["--data_name", "svamp", "--limit", "10", "--k", "0", "--alpha", "1", "--jobs", "1"],
            "--k must be whole numbers of at least 1",
        ),
        (
            ["--data_name", "svamp", "--limit", "10", "--k", "5", "--alpha", "nan", "--jobs", "1"],
            "--alpha must be finite",
        ),
        (["--model", "nowhere", "--pairs", "none.jsonl"], "no such file"),
    ],
)
def test_wrong_inputs(tmp_path, command, message):
    with pytest.raises(AUSteerError, match=message):
        main.main([*command, "--results", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.glob("*.md"))


def test_a_k_beyond_the_model_fails_its_cells_and_says_so(tmp_path, capsys):
    few = [
        "--data_name",
        "svamp",
        "--limit",
        "10",
        "--k",
        "9999",
        "--alpha",
        "1",
        "--jobs",
        "1",
        "--method",
        "published",
    ]
    assert main.main([*few, "--applied_module", "ffn", "--results", str(tmp_path), "--device", "cpu"]) == 1
    assert "FAILED svamp ffn published: k must be a whole number from 1 to 512" in capsys.readouterr().err
    assert "| vanilla |" in (tmp_path / "embedded-svamp.md").read_text()


def test_too_few_pairs(checkpoints, tmp_path):
    own_pairs(tmp_path / "few.jsonl", 4)
    with pytest.raises(AUSteerError, match="too few different prompts"):
        main.main(["--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "few.jsonl"), "--device", "cpu"])


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AUSteerError, match="no CUDA device"):
        main.main(["--device", "cuda"])


def test_steer_no_means_no(tmp_path, capsys):
    """bool("False") is true in the authors' script."""
    main.main(
        ["--data_name", "svamp", "--steer", "False", "--limit", "20", "--results", str(tmp_path), "--device", "cpu"]
    )
    assert {row["method"] for row in rows_of(tmp_path)} == {"vanilla", "prompt-only"}
    with pytest.raises(SystemExit):
        main.main(["--steer", "maybe"])


def test_example_pairs_are_good():
    assert len(read_pairs(ROOT / "datasets" / "example_pairs.jsonl")) >= 100


def _kill_after_records(process, folder, count):
    for _ in range(600):
        if len(list(folder.glob("records/*.json"))) >= count:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    command = [sys.executable, "main.py", "--data_name", "svamp", "--limit", "200", "--method", "random", "--draws", "9", "--jobs", "2", "--device", "cpu",
               "--results", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    _kill_after_records(process, tmp_path, 3)
    for _ in range(100):
        alive = subprocess.run(
            ["ps", "-o", "pid=,stat=", "-s", str(process.pid)], capture_output=True, text=True
        ).stdout
        if not [line for line in alive.splitlines() if " Z" not in line]:
            return
        time.sleep(0.1)
    pytest.fail(f"workers outlived their parent: {alive}")


@pytest.mark.slow
def test_killed_in_the_middle_goes_on(tmp_path):
    command = [sys.executable, "main.py", "--data_name", "svamp", "--limit", "40", "--method", "random", "--draws", "3", "--jobs", "1", "--device", "cpu",
               "--results", str(tmp_path)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _kill_after_records(process, tmp_path, 3)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("records/*.json")}
    assert len(before) >= 3 and not list(tmp_path.glob("*.md"))
    for text in before.values():
        json.loads(text)
    main.main(command[2:])
    after = {file.name: file.read_bytes() for file in tmp_path.glob("records/*.json")}
    assert len(after) > len(before) and all(after[name] == text for name, text in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "test2"])
def test_the_claims_hold_on_both_test_splits(tmp_path, split):
    """Causal AUSteer: at least 5 points at p < 1e-6, and more than each of 20 random draws, on two tasks."""
    for task in ("svamp", "copa"):
        main.main(["--data_name", task, "--draws", "20", "--test_split", split, "--results", str(tmp_path / task)])
        rows = rows_of(tmp_path / task)
        vanilla = next(row for row in rows if row["method"] == "vanilla")
        holds = []
        for site in ("attention", "ffn"):
            gains = {
                m: [report.gain(r, vanilla) for r in rows if r["method"] == m and r["site"] == site]
                for m in ("random", "causal")
            }
            (causal,) = [row for row in rows if row["method"] == "causal" and row["site"] == site]
            assert len(gains["random"]) == 20
            holds.append(gains["causal"][0] >= 5 and causal["p"] < 1e-6 and gains["causal"][0] > max(gains["random"]))
        assert any(holds), task
