"""The command `restore`: its data, its rows and rivals, what is measured, and the model that it saves."""

import copy
import json
import sys
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
from conftest import COMMON, PAIRS, SPECIAL, byte_tokenizer
from one_cell import computed
from reference import hook_steering
from tiny_families import save_family
from transformers import AutoConfig, AutoModelForCausalLM
from upstream import TEXTS, load, upstream

import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.export.fold import fold
from austeer.export.restored import save_restored
from austeer.methods import restore_lcc
from austeer.methods.restore_lcc import RECIPES, MeanLost, answer_loss, questions_of
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.pruning.prune import prune
from austeer.steering import steer
from eval.tasks.embedded import EmbeddedTask
from experiments import records, restore
from experiments.bench import BENCHES
from experiments.restoration import contenders, rows
from experiments.restoration.contenders import Adapted
from experiments.restoration.lab import Lab
from experiments.restoration.material import Material, find_files, general_text, instruction_pairs, windows
from experiments.restoration.measures import LM_EVAL_TASKS, perplexity, zero_shot
from experiments.search import SearchResult

IDS = torch.tensor([TEXTS[2]])
MINE = [Pair(*pair) for pair in PAIRS]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_restored_model_is_saved_by_folding(name, tmp_path):
    """Its architecture needs the bias (attention_bias); export refuses the others and says why."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON, **SPECIAL[name], attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    dense = rmodels.load(tmp_path / "dense", dtype="float32", device="cpu")
    dense.model.layers[0].self_attn.o_proj.bias.fill_(0.5)  # an existing bias stays
    pruned = copy.deepcopy(dense)
    prune(pruned, "magnitude", 0.5)
    pruned.save_pretrained(tmp_path / "pruned")
    method = MeanLost(dense)
    plan = method.plan(
        method.prepare(Evidence(pruned, byte_tokenizer(), MINE, "attention", None)), {"share": 0.5, "alpha": 1.0}
    )
    with steer(pruned, plan):
        live = pruned(IDS).logits
    fold(tmp_path / "pruned", plan, tmp_path / "restored", certificate=False)
    restored = rmodels.load(tmp_path / "restored", dtype="float32", device="cpu")
    assert torch.allclose(restored(IDS).logits, live, atol=1e-4) and not torch.equal(live, pruned(IDS).logits)
    with pytest.raises(AUSteerError, match="is folded already"):
        fold(tmp_path / "restored", plan, tmp_path / "twice", certificate=False)  # the shift would count twice


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_restored_model_runs_in_plain_transformers(checkpoints, name, tmp_path):
    """Its checkpoint has no bias in o_proj, so one is switched on."""
    dense = load(checkpoints, name)
    pruned = copy.deepcopy(dense)
    prune(pruned, "wanda", 0.5, TEXTS)
    method = MeanLost(dense)
    evidence = Evidence(pruned, byte_tokenizer(), MINE, "attention", None)
    plan = method.plan(method.prepare(evidence), {"share": 0.5, "alpha": 1.0})
    with steer(pruned, plan):
        live = pruned(IDS).logits
    pruned.generation_config.eos_token_id = [2, 7]
    certificate = save_restored(pruned, byte_tokenizer(), plan, tmp_path / "new" / "restored")
    assert certificate["rounding"]["greedy_agreement"] == 1.0
    restored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "restored",
        dtype=torch.float32,
        attn_implementation=pruned.config._attn_implementation.removeprefix("au_"),
    )
    assert torch.allclose(restored(IDS).logits, live, atol=1e-4) and not torch.equal(live, pruned(IDS).logits)
    assert restored.generation_config.eos_token_id == [2, 7]  # it stops where the original does
    for index, layer in enumerate(restored.model.layers):
        before = pruned.model.layers[index].self_attn
        assert torch.equal(layer.self_attn.o_proj.weight, before.o_proj.weight)  # as sparse as it was
        assert torch.allclose(layer.self_attn.o_proj.bias, before.o_proj.weight @ plan.shift("attention", index), atol=1e-5)  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["restored"]


def test_a_family_without_the_bias_is_refused_in_one_line(tmp_path):
    plan = Plan({}, {"attention": torch.ones(4, 80)})
    phi3 = rmodels.load(save_family(tmp_path / "phi3", "phi3"), device="cpu")
    with pytest.raises(AUSteerError, match=r"a restored phi3 model cannot be saved: .* no bias in o_proj"):
        save_restored(phi3, byte_tokenizer(), plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["phi3"]


def test_a_restored_model_with_gates_by_structure_is_saved(tmp_path):
    pruned = rmodels.load(save_family(tmp_path / "opt", "opt"), dtype="float32", device="cpu")
    prune(pruned, "wanda", 0.5, TEXTS)
    plan = Plan({}, {"attention": torch.randn(4, 64)})
    with steer(pruned, plan):
        live = pruned(IDS).logits
    save_restored(pruned, byte_tokenizer(), plan, tmp_path / "restored")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype=torch.float32)
    assert torch.allclose(restored(IDS).logits, live, atol=1e-4) and not torch.equal(live, pruned(IDS).logits)


def test_an_architecture_without_the_bias_is_refused(checkpoints, tmp_path):
    plan = Plan({}, {"attention": torch.ones(3, 64)})
    with pytest.raises(AUSteerError, match=r"a shift becomes a bias, but .*o_proj.weight has none: .* steer live"):
        fold(checkpoints["llama"], plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_perplexity_equals_loops(checkpoints, llama):
    plain, logp, count = upstream(checkpoints, llama), 0.0, 0
    for text in TEXTS:
        predicted = plain(torch.tensor([text])).logits[0].double().log_softmax(-1)
        for t in range(1, len(text)):
            logp, count = logp + float(predicted[t - 1, text[t]]), count + 1
    assert perplexity(llama, [*TEXTS, [1]]) == pytest.approx(torch.tensor(-logp / count).exp().item(), rel=1e-4)
    with pytest.raises(AUSteerError, match="at least two tokens"):
        perplexity(llama, [[1]])


def test_general_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text(
        '{"passage": "p"}\n{"passage": "q", "question": "?"}\n{"passage": "p"}\n{"text": "r"}\n'
    )
    assert general_text(tmp_path / "a.txt") == "one\ntwo" and general_text(tmp_path / "b.jsonl") == "p\n\nq\n\nr"
    (tmp_path / "c.jsonl").write_text('{"text": "r"}\n{"question": "?"}\n')
    (tmp_path / "d.txt").write_text(" \n")
    for name, message in (
        ("c.jsonl", "line 2: there is no text"),
        ("d.txt", "holds no text"),
        ("e.txt", "no such file"),
    ):
        with pytest.raises(AUSteerError, match=message):
            general_text(tmp_path / name)


def test_text_is_cut_into_pieces_of_one_length(tokenizer):
    ids = tokenizer("abcdefghij")["input_ids"]
    assert windows(tokenizer, "abcdefghij", 4) == [ids[:4], ids[4:8]]  # the rest of three is dropped
    assert windows(tokenizer, "abcdefghij", 100) == [ids]


def alpaca(path, count=40):
    rows = [
        {"instruction": f"Count to {n}.", "input": "in words" if n % 2 else "", "output": f"Up to {n}: {n * 'x'}"}
        for n in range(count)
    ]
    path.write_text(json.dumps([*rows, {"instruction": "Say nothing.", "input": "", "output": ""}]))
    return rows


def test_instructions_become_pairs(tmp_path):
    rows = alpaca(tmp_path / "alpaca.json")
    train, held_out, by = instruction_pairs(tmp_path / "alpaca.json", "tfidf")
    assert len(train) == 36 and len(held_out) == 4 and by == "the most similar other answer, by tfidf"
    assert train[0].prompt == "### Instruction:\nCount to 0.\n\n### Response:\n"
    assert train[1].prompt == "### Instruction:\nCount to 1.\n\n### Input:\nin words\n\n### Response:\n"
    assert [pair.positive for pair in [*train, *held_out]] == [row["output"] for row in rows]
    held_answers = {pair.positive for pair in held_out}
    assert all(pair.negative != pair.positive and pair.negative not in held_answers for pair in train)
    alpaca(tmp_path / "few.json", 10)
    with pytest.raises(AUSteerError, match="has 10 instructions with an answer; at least 20"):
        instruction_pairs(tmp_path / "few.json", "tfidf")
    (tmp_path / "other.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(AUSteerError, match="instruction, input, output is missing"):
        instruction_pairs(tmp_path / "other.jsonl", "tfidf")


def test_the_preset_finds_its_files(tmp_path, monkeypatch):
    nothing = {"instructions": None, "calibration": None, "text": None}
    monkeypatch.setattr("experiments.restoration.material.DATASETS", tmp_path / "datasets")
    assert find_files(nothing, "ours", None) == nothing
    with pytest.raises(AUSteerError, match=r"give --instructions FILE, or put alpaca/alpaca_data.json into the data"):
        find_files(nothing, "original", str(tmp_path))
    for name in ("Alpaca/alpaca_data.json", "boolq/train.jsonl", "boolq/dev.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files(nothing, "original", str(tmp_path))
    assert {kind: path.name for kind, path in found.items()} == {
        "instructions": "alpaca_data.json", "calibration": "train.jsonl", "text": "dev.jsonl"}  # fmt: skip
    for name in ("c4/train.txt", "wikitext2/wiki.test.raw"):  # take precedence over BoolQ's passages
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files(nothing | {"instructions": "mine.json"}, "original", str(tmp_path))
    assert [path.name for path in found.values()] == ["mine.json", "train.txt", "wiki.test.raw"]


@pytest.fixture
def lab(checkpoints, tokenizer):
    bench = SimpleNamespace(model=load(checkpoints, "llama"), tokenizer=tokenizer, grid_kind="small")
    material = Material(MINE, "", [], TEXTS, "", TEXTS, "")
    return Lab(bench, material, "magnitude", "0.5", RECIPES["ours"])


@pytest.mark.parametrize("dora", [False, True])
def test_lora_is_trained_on_the_same_loss_and_taken_out_again(lab, dora):
    pytest.importorskip("peft", reason="peft is in requirements2.txt")
    row, point, ids = Adapted(lab, dora), {"rank": 2, "rate": 0.03}, torch.tensor([TEXTS[2]])
    questions = questions_of(lab.evidence)
    plain, before = lab.pruned(ids).logits, float(answer_loss(lab.pruned, questions))
    with row.installed(point) as model, torch.no_grad():
        after, logits = float(answer_loss(model, questions)), model(ids).logits
    assert after < before - 0.1 and torch.equal(lab.pruned(ids).logits, plain)
    with row.installed(point) as model:  # kept, not trained again
        assert torch.equal(model(ids).logits, logits)
    trained = row._trained["2,0.03"]
    widths = 3 * 2 * (64 + 48) + (3 * 48 if dora else 0)
    assert row.size(point) == {"touched": 0, "numbers": widths}
    if not dora:  # what it computes, by hand
        for index, layer in enumerate(lab.pruned.model.layers):
            a, b = (
                next(w for n, w in trained.items() if f"layers.{index}." in n and f"lora_{side}" in n) for side in "AB"
            )
            layer.self_attn.o_proj.weight += b @ a
        assert torch.allclose(lab.pruned(ids).logits, logits, atol=1e-4)


def test_rivals_have_no_larger_grid_than_restorelcc(lab):
    ours, *others = contenders.contenders(lab, 1, contenders.RIVALS)
    assert [row.label for row in others[2:]] == ["LoRA", "DoRA", "EoRA, untrained"]
    assert all(1 < len(row.grid) <= len(ours.grid) == 9 for row in others)


def test_zero_shot_reads_lm_evals_results(llama, tokenizer, monkeypatch):
    asked = {}

    def simple_evaluate(model, **options):
        asked.update(options, model=model)
        if options["tasks"] == ["gone"]:
            raise KeyError("no task gone\nand more lines")
        scores = {"acc,none": 0.75, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}
        if options["tasks"] == ["wikitext"]:
            return {"results": {"wikitext": {"word_perplexity,none": 9.0}}, "n-samples": {"wikitext": {"effective": 8}}}
        return {"results": {"rte": scores}, "n-samples": {"rte": {"effective": 8, "original": 277}}}

    class HFLM:
        def __init__(self, **options):
            asked["wrapped"] = options

    for name, module in {"lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate, __spec__=object()),
                         "lm_eval.models": SimpleNamespace(),
                         "lm_eval.models.huggingface": SimpleNamespace(HFLM=HFLM)}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    assert zero_shot(llama, tokenizer, ["rte"], 8) == {"rte": {"accuracy": 0.75, "stderr": 0.1, "n": 8}}
    assert asked["wrapped"]["pretrained"] is llama and asked["num_fewshot"] == 0 and asked["limit"] == 8
    with pytest.raises(AUSteerError, match=r"^lm-eval could not run gone: KeyError: .*$"):
        zero_shot(llama, tokenizer, ["gone"], None)
    with pytest.raises(AUSteerError, match=r"--lm-eval wikitext: only single tasks that measure accuracy"):
        zero_shot(llama, tokenizer, ["wikitext"], None)


def test_zero_shot_equals_likelihoods_by_hand(checkpoints, llama, tokenizer, tmp_path):
    """Run lm-eval itself on a task of our own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    items = [{"question": f"Is {n} even?", "label": n % 2} for n in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "parity", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "label",
        "doc_to_choice": ["yes", "no"], "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    plain = upstream(checkpoints, llama)

    def likelihood(question, answer):
        prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
        logp = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logp[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))

    def share_right(count):
        right = [(likelihood(i["question"], "no") > likelihood(i["question"], "yes")) == i["label"] for i in items]
        return {"parity": {"accuracy": pytest.approx(sum(right[:count]) / count), "stderr": ANY, "n": count}}

    assert zero_shot(llama, tokenizer, [task], None) == share_right(6)
    plan = Plan({}, {"attention": 3 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))})
    with steer(llama, plan), hook_steering(plain, plan):  # a restored model is measured as it is restored
        assert zero_shot(llama, tokenizer, [task], 4) == share_right(4)


@pytest.fixture
def small_grid(monkeypatch):
    """Use few pairs and grid points, so that nothing takes long."""
    BENCHES.close()
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 100)
    for axis, values in (("SHARES", (0.25,)), ("RATES", (1e-2, 3e-2)), ("ALPHAS", (1.0, 2.0))):
        monkeypatch.setitem(getattr(restore_lcc, axis), "small", values)
    yield
    BENCHES.close()


@pytest.mark.slow
@pytest.mark.slow
def test_the_command_on_an_embedded_task(tmp_path, capsys, monkeypatch, small_grid):
    command = ["--data_name", "svamp", "--sparsity", "2:4", "--limit", "100", "--draws", "1", "--device", "cpu"]
    command += ["--results", str(tmp_path), "--out", str(tmp_path / "restored")]
    restore.main(command)
    output = capsys.readouterr().out
    assert "327,680 of 655,360 weights are zero (50.00 %)" in output and "accuracy on 100 items of test" in output
    rows = rows_in(tmp_path)
    labels = ["dense", "pruned", "RestoreLCC", "dense, trained alike", "random heads, trained alike, draw 1", "mean lost activation, untrained", "LoRA", "EoRA, untrained"]  # fmt: skip
    assert set(rows) == set(labels)
    assert [line.split(" | ")[0][2:] for line in output.splitlines() if "] |" in line] == labels
    assert "perplexity of held-out prompts" in output and "calibrated on prompts of the training pairs" in output
    vanilla = computed(tmp_path / "cells", task="svamp", limit=100, method="vanilla")
    assert rows["dense"]["columns"] == vanilla["columns"]  # the dense model was left as it is
    ours = rows["RestoreLCC"]
    assert set(ours["grid_scores"]) == {"0.25,0.01", "0.25,0.03"} and ours["touched"] == 128
    assert ours["value"] > rows["pruned"]["value"] + 0.05
    assert sum(records.unpack(ours["columns"]["accuracy"])) == round(100 * ours["value"])
    for row in rows.values():
        assert row["n"] == 100 and row["perplexity"] > 1 and row["low"] <= row["value"] <= row["high"]
        assert f"| {row['label']} |" in output
    assert (tmp_path / "embedded-svamp-restore-wanda-2of4.md").read_text().strip() in output

    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert any(layer.self_attn.o_proj.bias.any() for layer in restored.model.layers)

    command = command[:-2]  # --out would refuse the folder
    monkeypatch.setattr("experiments.store.Store.write", None)  # a finished row must not be computed again
    monkeypatch.setattr("experiments.restoration.lab.prune", None)  # nor a model pruned for nothing
    restore.main(command)
    assert capsys.readouterr().out == output.replace(output.splitlines()[-1] + "\n", "")


def test_nothing_is_done_where_nothing_beats_the_pruned_model(tmp_path, monkeypatch, small_grid):
    monkeypatch.setattr(rows, "full_grid", lambda ask, floor, grid: SearchResult(None, {}, {}, 0, len(floor)))
    command = ["--data_name", "copa", "--limit", "20", "--draws", "1", "--device", "cpu", "--results", str(tmp_path)]
    with pytest.raises(
        AUSteerError, match="no grid point beat the pruned model on validation: there is nothing to save"
    ):
        restore.main([*command, "--out", str(tmp_path / "restored")])
    by_label = rows_in(tmp_path)
    pruned = by_label.pop("pruned")
    del by_label["dense"]
    assert len(by_label) == 5 and not (tmp_path / "restored").exists()
    assert all(row["columns"] == pruned["columns"] and not row["touched"] for row in by_label.values())


def test_the_command_on_a_checkpoint_and_ones_own_pairs(checkpoints, tmp_path, capsys, small_grid):
    lines = [{"prompt": f"Is {n} more than {n + 1}? ", "positive": "no", "negative": "yes"} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("qwen3", "gemma2"):
        command = ["--model", str(checkpoints[name]), "--pairs", str(tmp_path / "mine.jsonl"), "--device", "cpu"]
        restore.main([*command, "--dtype", "float32", "--draws", "0", "--rivals", "--results", str(tmp_path / name)])
        output = capsys.readouterr().out
        assert "## mine" in output and "right answer preferred on" in output and "| RestoreLCC |" in output


def test_the_preset_trains_on_instructions_and_measures_other_text(tmp_path, capsys, small_grid, monkeypatch):
    """The task is only tested on: its validation items are not asked."""
    told = [
        {"instruction": pair.prompt, "input": "", "output": pair.positive} for pair in EmbeddedTask("copa").pairs[:99]
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(told))
    for name in ("calibration", "text"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name} {n}" for n in range(600)))
    monkeypatch.setattr("experiments.restoration.measures.find_spec", lambda name: True)
    monkeypatch.setattr(rows, "zero_shot", lambda model, tokenizer, tasks, limit: {
        task: {"accuracy": 0.5, "stderr": 0.05, "n": limit} for task in tasks})  # fmt: skip
    command = ["--data_name", "copa", "--preset", "original", "--pruning", "sparsegpt", "--limit", "20", "--draws", "0"]
    command += [
        "--rivals",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
        "--instructions",
        str(tmp_path / "alpaca.json"),
    ]
    command += ["--calibration", str(tmp_path / "calibration.txt"), "--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr("eval.tasks.embedded.EmbeddedTask.validation", None, raising=False)
    restore.main([*command, "--lm-eval"])
    output = capsys.readouterr().out
    assert (
        f"perplexity of {tmp_path.name}/text.txt" in output
        and f"calibrated on {tmp_path.name}/calibration.txt" in output
    )
    assert "grid points chosen on held-out instructions" in output
    assert "| model | " + " | ".join(LM_EVAL_TASKS) + " | mean |" in output and "| pruned | 50.0 ± 5.0 |" in output
    row = rows_in(tmp_path)["RestoreLCC"]
    assert (
        row["recipe"] == vars(RECIPES["original"])
        and row["held_out_hash"]
        and all(s < 0 for s in row["grid_scores"].values())
    )
    assert (tmp_path / "embedded-copa-restore-sparsegpt-0.5-original.md").exists()


def test_out_is_refused_before_anything_is_pruned(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.restoration.lab.prune", lambda *args: pytest.fail("pruned first"))
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"{n}", "positive": " a", "negative": " b"}) + "\n" for n in range(40)))  # fmt: skip
    command = [
        "--model",
        str(save_family(tmp_path / "phi3", "phi3")),
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--rivals",
        "--device",
        "cpu",
    ]
    with pytest.raises(AUSteerError, match="a restored phi3 model cannot be saved"):
        restore.main([*command, "--results", str(tmp_path / "results"), "--out", str(tmp_path / "restored")])


def rows_in(folder):
    found = (json.loads(path.read_text()) for path in (folder / "restore").glob("*.json"))
    return {row["label"]: row for row in found if "label" in row}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--sparsity", "2"], "give a share above 0"),
        (["--data_name", "gsm8k"], "the embedded models' tasks are boolq"),
        (["--pairs", "x.jsonl"], "--pairs needs --model"),
        (["--model", "some/model"], "--model needs --data_name"),
        (["--draws", "-1"], "--draws is -1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--out", "new"], "--out saves one model: name a task"),
        (["--data_name", "copa", "--out", "."], "exists already"),
        (["--data_name", "copa", "--text", "gone.txt"], "no such file: gone.txt"),
        (["--preset", "original", "--data-dir", "."], "preset original needs instructions in Alpaca's form"),
        (
            ["--data_name", "copa", "--pruning", "structured", "--sparsity", "2:4"],
            "removes a share of heads and channels",
        ),
    ],
)
def test_wrong_inputs(tmp_path, command, message):
    with pytest.raises(AUSteerError, match=message):
        restore.main([*command, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_claim_on_svamp(tmp_path):
    """Check that the restored model beats the pruned one and the untrained control, and even the dense model."""
    restore.main(["--data_name", "svamp", "--draws", "1", "--rivals", "--device", "cpu", "--results", str(tmp_path)])
    rows = rows_in(tmp_path)
    assert rows["RestoreLCC"]["low"] > max(rows["pruned"]["high"], rows["mean lost activation, untrained"]["high"])
    assert rows["RestoreLCC"]["low"] > rows["dense"]["high"]  # more than was lost, so this is also steering
