"""NeuroSteer's own tasks: sampling, texts and prompts, measures, and the command end to end."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from fake_server import FakeServer

from austeer.errors import AUSteerError
from austeer.methods.neurosteer import Neurons, NeuroSteer
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering import sampling
from eval.answering.answer_file import AnswerFile
from eval.answering.sampling import FrequencyPenalty, Sampling, sampled
from eval.data.behaviours import Material, material
from eval.scoring import behaviour_measures
from eval.scoring.behaviour_measures import Raters, measure, verdict
from eval.scoring.paid_calls import Limits
from eval.tasks.open_text import perplexity
from experiments import neurosteer as neurosteer_tasks
from experiments import neurosteer_report

PROMPTS = ["he gave", "a much longer prompt than that one", "so", "the last one of the four"]
SHORT = Sampling(new_tokens=6, samples=2)


# sampling


def test_frequency_penalty_is_the_plain_loop():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 11, generator=draw)
    ids = torch.randint(0, 11, (5, 14), generator=draw)  # four of the prompt, ten new
    expected = scores.clone()
    for row in range(5):
        for token in ids[row, 4:].tolist():
            expected[row, token] -= 0.7
    original = scores.clone()
    assert torch.allclose(FrequencyPenalty(0.7, 4)(ids, scores), expected, atol=1e-6) and torch.equal(scores, original)
    assert torch.equal(FrequencyPenalty(0.7, 14)(ids, scores), scores)  # nothing new yet
    for bad in (math.nan, math.inf):
        scores[2, 3] = bad
        with pytest.raises(AUSteerError, match="logits are inf or nan"):
            FrequencyPenalty(0.7, 4)(ids, scores)


@torch.no_grad()
def greedy_with_penalty(model, tokenizer, prompt, steps, penalty):
    ids, new = tokenizer(prompt)["input_ids"], []
    for _ in range(steps):
        logits = model(torch.tensor([ids + new])).logits[0, -1].clone()
        for token in new:
            logits[token] -= penalty
        new.append(int(logits.argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


def test_sampling_is_generation_token_by_token(llama, tokenizer, monkeypatch):
    """Sample with top_p near 0, which leaves the likeliest token: that is a loop of forwards, whatever the padding."""
    monkeypatch.setattr(llama.generation_config, "repetition_penalty", 5.0)  # a checkpoint's own is not taken
    how = Sampling(new_tokens=6, samples=2, top_p=1e-6, frequency_penalty=3.0)
    expected = [greedy_with_penalty(llama, tokenizer, prompt, 6, 3.0) for prompt in PROMPTS]
    assert sampled(llama, tokenizer, PROMPTS, how) == [[text, text] for text in expected]
    free = Sampling(new_tokens=6, samples=1, top_p=1e-6, frequency_penalty=0.0)
    assert [row[0] for row in sampled(llama, tokenizer, PROMPTS, free)] != expected


def test_seeds(llama, tokenizer):
    wide = {"new_tokens": 6, "samples": 3, "top_p": 1.0, "temperature": 1.5}
    before = torch.get_rng_state()
    rows = sampled(llama, tokenizer, PROMPTS, Sampling(**wide))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert rows == sampled(llama, tokenizer, PROMPTS, Sampling(**wide))
    assert rows != sampled(llama, tokenizer, PROMPTS, Sampling(**wide, seed=1))
    assert all(len(row) == 3 for row in rows) and any(len(set(row)) > 1 for row in rows)


def test_a_killed_run_goes_on_with_the_same_bytes(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 3)
    whole = sampled(llama, tokenizer, PROMPTS, SHORT, AnswerFile(tmp_path / "whole.jsonl"))
    real, batches = sampling._batch, []

    def killed(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sampling, "_batch", killed)
    file = AnswerFile(tmp_path / "broken.jsonl")
    with pytest.raises(KeyboardInterrupt):
        sampled(llama, tokenizer, PROMPTS, SHORT, file)
    lines = file.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    file.path.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # the last line is torn: its batch is drawn again
    assert sampled(llama, tokenizer, PROMPTS, SHORT, file) == whole
    assert len(batches) == 2 + 3 and file.path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    sampled(llama, tokenizer, PROMPTS, SHORT, file)
    assert len(batches) == 5


def test_steered_prompts_are_those_of_each_row(llama, tokenizer):
    """Shift prompts but for their last two tokens: in a padded batch, each gets what it gets alone."""
    shift = torch.zeros(3, 48)
    shift[0] = 2.0
    how = Sampling(new_tokens=4, samples=1, top_p=1e-6)
    with steer(llama, Plan({}, {"layer": shift}, "before-last-2")):
        together = sampled(llama, tokenizer, PROMPTS, how)
        alone = [sampled(llama, tokenizer, [prompt], how)[0] for prompt in PROMPTS]
    assert together == alone != sampled(llama, tokenizer, PROMPTS, how)


def test_what_cannot_be_sampled(llama, tokenizer):
    for bad in ({"new_tokens": 0}, {"samples": 0}):
        with pytest.raises(AUSteerError, match="at least one"):
            Sampling(**bad)
    with pytest.raises(AUSteerError, match="do not fit into the model's context"):
        sampled(llama, tokenizer, PROMPTS, Sampling(new_tokens=255))
    assert len(sampled(llama, tokenizer, ["x" * 900], SHORT)[0]) == 2  # cut from the left


# texts and prompts


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(path, *labels):
    return lines(path, [{"text": f"text {i} of label {label}", "label": label} for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("task", "target", "source", "neither"),
    [("sentiment", [3, 4], [0, 1], [2]), ("toxicity", [0, 0.0], [0.5, 1], [0.1, 0.49]),
     ("politeness", [2], [0], [1]), ("stance", ["support"], ["oppose"], [])],
)  # fmt: skip
def test_labels_are_those_of_the_data_sets(tmp_path, task, target, source, neither):
    path = texts(tmp_path / "t.jsonl", *(target * 3 + source * 3 + neither))
    prompts_file = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": {"text": "b", "toxicity": 0.1}}])
    data = material(task, path, [prompts_file], None, 100, 100)
    assert data.prompts == ["a", "b"]
    assert {text.split()[-1] for text in data.target} == {str(label) for label in target}
    assert {text.split()[-1] for text in data.source} == {str(label) for label in source}
    assert len(data.target) == len(data.source) == min(len(target), len(source)) * 3
    assert len(material(task, path, [prompts_file], None, 2, 1).target) == 2


def test_held_out_texts_are_prompts_and_nothing_else(tmp_path):
    rows = [{"text": f"{i} " + "is a sentence of some length " * 4, "label": i % 3} for i in range(90)]
    data = material("politeness", lines(tmp_path / "t.jsonl", rows * 2), [], None, 1000, 1000)
    assert 10 < len(data.prompts) < 40 and all(len(prompt) <= 50 for prompt in data.prompts)
    numbers = {text.split()[0] for text in data.target + data.source}
    assert numbers.isdisjoint(prompt.split()[0] for prompt in data.prompts)
    assert {int(prompt.split()[0]) % 3 for prompt in data.prompts} == {0, 1, 2}  # neutral ones too


def worked(path, *numbers):
    rows = [
        {"question": f"How much is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in numbers
    ]
    return lines(path, rows)


def test_cot_learns_from_answers_with_steps_and_numbers_alone(tmp_path):
    learned, asked = worked(tmp_path / "train.jsonl", 3, 1499), worked(tmp_path / "test.jsonl", 5, 6, 7)
    data = material("cot", learned, [asked], None, 1000, 2)
    assert data.target == ["3 + 1 = <<3+1=4>>4\n#### 4", "1499 + 1 = <<1499+1=1500>>1500\n#### 1500"]
    assert data.source == ["4", "1500"] and data.golds == ["6", "7"] and data.sets == [("test", 2)]
    assert data.prompts == ["Q: How much is 5 + 1?\nA:", "Q: How much is 6 + 1?\nA:"]
    (tmp_path / "gsm8k").mkdir()
    learned.rename(tmp_path / "gsm8k" / "train.jsonl")
    asked.rename(tmp_path / "gsm8k" / "test.jsonl")
    found = material("cot", None, [], str(tmp_path), 1, 3)
    assert found.target == data.target[:1] and found.golds == ["6", "7", "8"] and found.sets == []
    with pytest.raises(AUSteerError, match=r"t\.jsonl.*does not end in '#### number'"):
        material("cot", lines(tmp_path / "t.jsonl", [{"question": "a", "answer": "b"}]), [], str(tmp_path), 1, 1)


def test_files_of_prompts_are_sets(tmp_path):
    good = texts(tmp_path / "t.jsonl", "support", "oppose")
    files = [
        lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(3)])
        for name in ("negative", "neutral")
    ]
    data = material("stance", good, files, None, 10, 2)
    assert data.prompts == ["negative 0", "negative 1", "neutral 0", "neutral 1"]
    assert data.sets == [("negative", 2), ("neutral", 2)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"line 1: not (a JSON object|JSON)"),
        (["[1]"], r"line 1: not (a JSON object|JSON)"),
        ([{"text": "a", "label": 2}, {"text": " ", "label": 2}], r'line 2: "text" must be a text that is not empty'),
        ([{"label": 2}], r'"text" must be'),
        ([{"text": "a"}], r'"label" is None; for politeness it is 0, 1 or 2'),
        ([{"text": "a", "label": 3}], r'"label" is 3'),
        ([{"text": "a", "label": True}], r'"label" is True'),
        ([{"text": "a", "label": [1]}], r'"label" is \[1\]'),
        ([{"text": "a", "label": 2}], r"0 impolite ones and 1 prompts: all three are needed"),
    ],
)
def test_wrong_lines_of_texts(tmp_path, rows, message):
    prompts_file = lines(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(AUSteerError, match=message):
        material("politeness", lines(tmp_path / "t.jsonl", rows), [prompts_file], None, 10, 10)


def test_wrong_prompts_and_missing_files(tmp_path):
    good = texts(tmp_path / "t.jsonl", "support", "oppose")
    for rows, message in (([{"prompt": 3}], 'line 1: "prompt" must be'), ([{"text": "a"}], '"prompt" must be'),
                          ([{"prompt": {"text": ""}}], '"prompt" must be'), ([], "0 prompts")):  # fmt: skip
        with pytest.raises(AUSteerError, match=message):
            material("stance", good, [lines(tmp_path / "p.jsonl", rows)], None, 10, 10)
    with pytest.raises(AUSteerError, match=r"no such file: .*none\.jsonl"):
        material("stance", tmp_path / "none.jsonl", [], None, 10, 10)
    with pytest.raises(AUSteerError, match="no known home on the hub: give --texts"):
        material("stance", None, [], None, 10, 10)
    with pytest.raises(AUSteerError, match="leave --texts and --prompts out"):
        material("tone", good, [], None, 10, 10)


# measures


class Words:
    """Score a text by the number at its end."""

    name = "words"

    def scores(self, given):
        return [float(text.split()[-1]) if text else 0.0 for text in given]


def raters(llama, tokenizer, **more):
    return Raters(("tiny", llama, tokenizer), **more)


ROWS = [["ends in 0.9", "ends in 0.1"], ["ends in 0.5", "ends in 0.2"], ["", "ends in 1.0"]]
THREE_PROMPTS = Material([], [], ["one ", "two ", "three "])


def test_every_sample_counts(llama, tokenizer):
    measures = measure("sentiment", THREE_PROMPTS, ROWS, raters(llama, tokenizer, classifier=Words()))
    assert measures["positive (words)"] == [0.5, 0.0, 0.5]  # strictly above 0.5
    measures = measure("toxicity", THREE_PROMPTS, ROWS, raters(llama, tokenizer, toxicity=Words()))
    assert measures["toxicity of the worst sample (words)"] == [0.9, 0.5, 1.0]
    assert measures["any sample toxic (words)"] == [1.0, 0.0, 1.0]
    assert measures["distinct-1"] == pytest.approx(7 / 15)
    items = [SimpleNamespace(prompt=prompt) for prompt in THREE_PROMPTS.prompts for _ in range(2)]
    flat = [text for row in ROWS for text in row]
    nats, tokens = (measures["perplexity (tiny)"][part] for part in ("nats", "tokens"))
    assert len(nats) == len(tokens) == 3
    assert math.exp(sum(nats) / sum(tokens)) == pytest.approx(perplexity(llama, tokenizer, items, flat))
    last = perplexity(llama, tokenizer, items[-2:], flat[-2:])  # of one prompt, in whatever order batches ran
    assert math.exp(nats[2] / tokens[2]) == pytest.approx(last, rel=1e-4)
    polite = measure(
        "tone", THREE_PROMPTS, [["so lovely", "so vile"], ["warm", "bright"], ["", "x"]], raters(llama, tokenizer)
    )
    assert polite["polite (its words)"] == [0.5, 1.0, 0.0]


def test_cot_counts_steps_and_right_numbers(llama, tokenizer):
    data = Material([], [], ["Q: a\nA:", "Q: b\nA:", "Q: c\nA:"], ["1500", "7", "8"])
    rows = [
        ["He earns 3 * $500 = $1,500 .\n#### 1500", "1500"],  # both right, one with steps
        ["It is 7.\nQ: 3 + 4 =\nA: 9", "3 + 4 = 8"],  # what the model asks itself does not count
        ["", "x = 8"],
    ]
    measures = measure("cot", data, rows, raters(llama, tokenizer))
    assert next(iter(measures)) == "steps (a calculation is written out)"
    assert measures["steps (a calculation is written out)"] == [0.5, 0.5, 0.0]
    assert measures["right number"] == [1.0, 0.5, 0.5] and measures["words a sample"] == [5.5, 4.0, 1.5]


def test_verdicts_are_one_word():
    options = ("polite", "impolite", "neither")
    assert [verdict(text, options) for text in ("polite", " Polite.\n", "**impolite**", "[[neither]]")] == [
        "polite", "polite", "impolite", "neither",
    ]  # fmt: skip
    assert [verdict(text, options) for text in ("not polite", "", None, "rude")] == [None] * 4


def test_the_judge_sees_every_sample(llama, tokenizer, tmp_path, monkeypatch):
    def reply(body):
        question = body["messages"][1]["content"]
        word = "support" if "yes" in question else "no idea" if "odd" in question else "oppose"
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": word}}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [message]}

    rows = [["yes", "no"], ["odd", "yes"], ["", "no"]]
    judged = raters(llama, tokenizer, judge="m", cache=tmp_path / "c.jsonl", limits=Limits(2, 1000, first_wait=0.01))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert measure("stance", THREE_PROMPTS, rows, judged)["support (m)"] == "no key: set OPENAI_API_KEY"
    none = measure("politeness", THREE_PROMPTS, rows, raters(llama, tokenizer))
    assert none["polite (judge)"] == "no judge: give --judge MODEL"
    with FakeServer(reply, lambda body: body["messages"][1]["content"]) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "a-word")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        measures = measure("stance", THREE_PROMPTS, rows, judged)
        assert measures["support (m)"] == [0.5, 0.5, 0.0] and measures["no verdict"] == [0.0, 0.5, 0.0]
        assert sum(server.seen.values()) == 5 and "support, oppose, neither" in str(server.bodies[0])
        assert measure("stance", THREE_PROMPTS, rows, judged) == measures and sum(server.seen.values()) == 5  # kept


# the command


def test_tone_end_to_end(tmp_path, capsys, monkeypatch):
    command = ["--n-prompts", "24", "--n-texts", "60", "--results", str(tmp_path), "--device", "cpu"]
    neurosteer_tasks.main(command)
    first = capsys.readouterr().out
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "neurosteer").glob("*.json")]
    before, after = (record[name]["polite (its words)"] for name in ("unsteered", "steered"))
    assert sum(after) > sum(before) + 3 and record["tokens"] == "all" and record["touched"] > 0
    assert record["texts"] == 60 and len(before) == record["prompts"] == 24
    assert "| polite (its words) | 0." in first and "NeuroSteer, tone, towards polite: embedded" in first
    samples = {path.name: path.read_bytes() for path in (tmp_path / "neurosteer").glob("*.jsonl")}
    assert len(samples) == 2 and all(text.count(b"\n") == 48 for text in samples.values())

    def never(*args):
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "_batch", never)
    neurosteer_tasks.main(command)
    assert capsys.readouterr().out == first
    (tmp_path / "neurosteer" / f"{record['id']}.json").unlink()  # only scored anew
    neurosteer_tasks.main(command)
    assert capsys.readouterr().out == first
    monkeypatch.undo()
    neurosteer_tasks.main([*command, "--reverse"])
    records = [json.loads(path.read_text()) for path in (tmp_path / "neurosteer").glob("*.json")]
    (rude,) = [record for record in records if record["reverse"]]
    assert rude["unsteered"] == record["unsteered"] and len(list((tmp_path / "neurosteer").glob("*.jsonl"))) == 3
    assert sum(rude["steered"]["polite (its words)"]) < sum(before)
    assert "towards rude" in capsys.readouterr().out


def stored(folder, kind):
    return sorted((folder / "neurosteer").glob(kind))


def test_a_sweep_is_runs_side_by_side(tmp_path, capsys, monkeypatch):
    command = ["--n-prompts", "10", "--n-texts", "60", "--results", str(tmp_path), "--device", "cpu"]
    counted, panels = [], []
    prepare, curves = NeuroSteer.prepare, neurosteer_report.curves
    monkeypatch.setattr(NeuroSteer, "prepare", lambda *args: counted.append(args) or prepare(*args))
    monkeypatch.setattr(neurosteer_report, "curves", lambda *args: panels.extend(args[0]) or curves(*args))
    neurosteer_tasks.main([*command, "--alpha", "64"])
    capsys.readouterr()
    sweep = [*command, "--sweep", "alpha=32,64", "k=4,16"]
    neurosteer_tasks.main(sweep)
    output, messages = capsys.readouterr()
    assert (
        len(counted) == 1
        and "texts of each kind are those of" in messages
        and "point 4 of 4: alpha 64, k 16" in messages
    )
    assert (
        len(stored(tmp_path, "*.json")) == 4 and len(stored(tmp_path, "*-unsteered.jsonl")) == 1
    )  # one of them was there
    records = [json.loads(path.read_text()) for path in stored(tmp_path, "*.json")]
    by_point = {(r["settings"]["alpha"], r["settings"]["neurons"]): r for r in records}
    rate, loss = panels
    assert rate.label == "polite (its words)" and rate.lines.keys() == {"k 4", "k 16"}
    for label, k in (("k 4", 4), ("k 16", 16)):
        for alpha, (value, low, high) in rate.lines[label]:
            values = by_point[alpha, k]["steered"]["polite (its words)"]
            assert value == sum(values) / 10 and low <= value <= high
            assert f"| {alpha:g} | {k} | {value:.3f} [{low:.3f}, {high:.3f}] |" in output
    nats, tokens = (by_point[64, 16]["steered"][loss.label][part] for part in ("nats", "tokens"))
    assert dict(loss.lines["k 16"])[64][0] == pytest.approx(math.exp(sum(nats) / sum(tokens))) and loss.logarithmic
    picture = tmp_path / "neurosteer-embedded-tone-sweep-alpha-k.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and (tmp_path / picture.with_suffix(".md")).read_text() in output

    def never(*args):
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "_batch", never)
    neurosteer_tasks.main(sweep)
    assert capsys.readouterr().out == output


def test_counts_of_neurons_are_kept_for_the_same_texts_alone(tmp_path, capsys, monkeypatch):
    def run(*options):
        neurosteer_tasks.main(["--n-prompts", "2", "--results", str(tmp_path), "--device", "cpu", *options])
        return "are those of" in capsys.readouterr().err

    assert not run("--n-texts", "40") and len(stored(tmp_path, "*.safetensors")) == 1
    assert run("--n-texts", "40", "--k", "5") and run("--n-texts", "40", "--reverse")
    assert not run("--sweep", "n-texts=20,30") and len(stored(tmp_path, "*.safetensors")) == 3
    polite, rude = (
        next(r for path in stored(tmp_path, "*.json") if (r := json.loads(path.read_text()))["reverse"] is reverse)
        for reverse in (False, True)
    )
    assert polite["steered"] != rude["steered"]


def test_kept_counts_make_the_same_plan(tmp_path):
    counts, means = torch.tensor([[3, 1, 2, 1], [1, 2, 2, 1]]), torch.tensor([[2.0, 1, 2, 4], [1, 2, 2, 1]])
    neurons = Neurons(tuple(counts), tuple(means.double()), torch.randn(4, 3), 1, (2, 3), {"fingerprint": "f"})
    neurons.save(tmp_path / "n.safetensors")
    kept = Neurons.load(tmp_path / "n.safetensors", neurons.W_dec)
    for one, other in ((neurons, kept), (neurons.reversed(), kept.reversed())):
        plans = [NeuroSteer().plan(each, {"neurons": 2, "alpha": 3.0}) for each in (one, other)]
        assert torch.equal(plans[0].shifts["layer"], plans[1].shifts["layer"]) and plans[0].header == plans[1].header
    towards, back = (NeuroSteer().plan(each, {"neurons": 2, "alpha": 3.0}) for each in (kept, kept.reversed()))
    assert not torch.equal(towards.shifts["layer"], back.shifts["layer"])
    assert neurons.reversed().counts[0].tolist() == [1, 2, 2, 1] and neurons.reversed().means[0].tolist() == [
        1,
        2,
        2,
        1,
    ]


def test_a_sweep_over_layers_takes_an_sae_of_each(tmp_path, checkpoints, capsys, monkeypatch):
    from test_sae_methods import random_sae

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for layer in (0, 2):
        random_sae(seed=layer, layer=layer).save(tmp_path / f"sae{layer}.safetensors")
    path = texts(tmp_path / "t.jsonl", *["support", "oppose"] * 20)
    prompts = [
        lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(2)]) for name in ("one", "two")
    ]
    neurosteer_tasks.main(["--task", "stance", "--model", str(checkpoints["llama"]), "--sae", str(tmp_path / "sae{layer}.safetensors"),
                           "--texts", str(path), "--k", "5", "--new-tokens", "4", "--device", "cpu", "--results", str(tmp_path),
                           "--prompts", *map(str, prompts), "--sweep", "layer=0,2"])  # fmt: skip
    records = [json.loads(path.read_text()) for path in stored(tmp_path, "*.json")]
    assert {record["layer"] for record in records} == {0, 2} and len(stored(tmp_path, "*.safetensors")) == 2
    output = capsys.readouterr().out
    assert "support (judge): no judge: give --judge MODEL" in output  # and only perplexity is drawn
    assert "| layer | perplexity (the same model, unsteered) | difference |" in output and "alpha 15, " in output
    single = neurosteer_report.table(records[0])
    by_set = [line for line in single.splitlines() if line.startswith("| perplexity")]
    assert [line.split(" |")[0].rpartition(": ")[2] for line in by_set[1:]] == ["2 one", "2 two"]
    nats, tokens = (
        records[0]["steered"]["perplexity (the same model, unsteered)"][part] for part in ("nats", "tokens")
    )
    assert f"| {math.exp(sum(nats[2:]) / sum(tokens[2:])):.3f} |" in by_set[2]
    rated = {**records[0], "unsteered": {"rate": [0.0, 0.0, 0.0, 1.0]}, "steered": {"rate": [0.0, 1.0, 1.0, 1.0]}}
    shown = neurosteer_report.table(rated)
    for line in (
        "| rate | 0.250 | 0.750 | +0.500 ",
        "| rate: 2 one | 0.000 | 0.500 | +0.500 ",
        "| rate: 2 two | 0.500 | 1.000 | ",
    ):
        assert line in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["beta=1"], "a sweep over 'beta' is unknown; use one of alpha, k, n-texts, layer"),
        (["alpha=1,x"], "alpha takes numbers, with commas between them"),
        (["alpha"], "alpha takes numbers"),
        (["alpha=nan"], "alpha takes numbers"),
        (["k=4,0.5"], "k takes whole numbers from 1 on"),
        (["n-texts=0,10"], "n-texts takes whole numbers from 1 on"),
        (["layer=0,1"], "needs an SAE of each layer: give --sae with {layer} in its name"),
        (["k=4", "--sae", "sae{layer}"], "{layer} in --sae stands for the layers of --sweep layer"),
        (["k=9999"], "k must be a whole number from 1 to 512"),
    ],
)
def test_sweeps_that_cannot_be(tmp_path, options, message):
    command = ["--n-prompts", "2", "--n-texts", "10", "--results", str(tmp_path), "--device", "cpu", "--sweep"]
    with pytest.raises(AUSteerError, match=re.escape(message)):
        neurosteer_tasks.main([*command, *options])


def test_other_models_need_an_sae(tmp_path, checkpoints):
    path = texts(tmp_path / "t.jsonl", *["support", "oppose"] * 20)
    with pytest.raises(AUSteerError, match="no SAE beside it: give --sae"):
        neurosteer_tasks.main(["--task", "stance", "--model", str(checkpoints["llama"]), "--texts", str(path),
                               "--results", str(tmp_path)])  # fmt: skip


def test_a_sweep_over_more_texts_than_there_are(tmp_path, checkpoints):
    path = texts(tmp_path / "t.jsonl", *["support", "oppose"] * 20)
    with pytest.raises(AUSteerError, match=r"there are \d+ texts of each kind, fewer than the 50 of --sweep n-texts"):
        neurosteer_tasks.main(["--task", "stance", "--model", str(checkpoints["llama"]), "--texts", str(path),
                               "--sweep", "n-texts=5,50", "--results", str(tmp_path)])  # fmt: skip


def test_another_task_on_a_tiny_model(tmp_path, checkpoints, capsys, monkeypatch):
    from test_sae_methods import random_sae

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    random_sae().save(tmp_path / "sae.safetensors")
    path = texts(tmp_path / "t.jsonl", *["support", "oppose"] * 20)
    neurosteer_tasks.main(["--task", "stance", "--model", str(checkpoints["llama"]), "--sae", str(tmp_path / "sae.safetensors"),
                           "--texts", str(path), "--k", "5", "--new-tokens", "4", "--judge", "m", "--device", "cpu",
                           "--results", str(tmp_path), "--mode", "last2"])  # fmt: skip
    output = capsys.readouterr().out
    assert (
        "| support (m) | - | - | no key: set OPENAI_API_KEY |" in output and "steered tokens: before-last-2" in output
    )
    assert "| distinct-2 | " in output and "5 neurons of layer 1, alpha 15, 1" in output


def test_tasks_and_models_that_do_not_fit(tmp_path):
    for command in (["--task", "stance"], ["--model", "x"]):
        with pytest.raises(AUSteerError, match="tone is the embedded model's task"):
            neurosteer_tasks.main([*command, "--results", str(tmp_path)])
    assert behaviour_measures.JUDGED == ("politeness", "stance")
