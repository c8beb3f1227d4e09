"""NeuroSteer's own tasks: sampling, texts and prompts, measures, and the command end to end."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from fake_server import FakeServer

from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering import sampling
from eval.answering.answer_file import AnswerFile
from eval.answering.sampling import FrequencyPenalty, Sampling, sampled
from eval.data.behaviours import material
from eval.scoring import behaviour_measures
from eval.scoring.behaviour_measures import Raters, measure, verdict
from eval.scoring.paid_calls import Limits
from eval.tasks.open_text import perplexity
from experiments import neurosteer as neurosteer_tasks

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
    data = material(task, path, prompts_file, None, 100, 100)
    assert data.prompts == ["a", "b"]
    assert {text.split()[-1] for text in data.target} == {str(label) for label in target}
    assert {text.split()[-1] for text in data.source} == {str(label) for label in source}
    assert len(data.target) == len(data.source) == min(len(target), len(source)) * 3
    assert len(material(task, path, prompts_file, None, 2, 1).target) == 2


def test_held_out_texts_are_prompts_and_nothing_else(tmp_path):
    rows = [{"text": f"{i} " + "is a sentence of some length " * 4, "label": i % 3} for i in range(90)]
    data = material("politeness", lines(tmp_path / "t.jsonl", rows * 2), None, None, 1000, 1000)
    assert 10 < len(data.prompts) < 40 and all(len(prompt) <= 50 for prompt in data.prompts)
    numbers = {text.split()[0] for text in data.target + data.source}
    assert numbers.isdisjoint(prompt.split()[0] for prompt in data.prompts)
    assert {int(prompt.split()[0]) % 3 for prompt in data.prompts} == {0, 1, 2}  # neutral ones too


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
        material("politeness", lines(tmp_path / "t.jsonl", rows), prompts_file, None, 10, 10)


def test_wrong_prompts_and_missing_files(tmp_path):
    good = texts(tmp_path / "t.jsonl", "support", "oppose")
    for rows, message in (([{"prompt": 3}], 'line 1: "prompt" must be'), ([{"text": "a"}], '"prompt" must be'),
                          ([{"prompt": {"text": ""}}], '"prompt" must be'), ([], "0 prompts")):  # fmt: skip
        with pytest.raises(AUSteerError, match=message):
            material("stance", good, lines(tmp_path / "p.jsonl", rows), None, 10, 10)
    with pytest.raises(AUSteerError, match=r"no such file: .*none\.jsonl"):
        material("stance", tmp_path / "none.jsonl", None, None, 10, 10)
    with pytest.raises(AUSteerError, match="no known home on the hub: give --texts"):
        material("stance", None, None, None, 10, 10)
    with pytest.raises(AUSteerError, match="leave --texts and --prompts out"):
        material("tone", good, None, None, 10, 10)


# measures


class Words:
    """Score a text by the number at its end."""

    name = "words"

    def scores(self, given):
        return [float(text.split()[-1]) if text else 0.0 for text in given]


def raters(llama, tokenizer, **more):
    return Raters(("tiny", llama, tokenizer), **more)


ROWS = [["ends in 0.9", "ends in 0.1"], ["ends in 0.5", "ends in 0.2"], ["", "ends in 1.0"]]
THREE_PROMPTS = ["one ", "two ", "three "]


def test_every_sample_counts(llama, tokenizer):
    measures = measure("sentiment", THREE_PROMPTS, ROWS, raters(llama, tokenizer, classifier=Words()))
    assert measures["positive (words)"] == [0.5, 0.0, 0.5]  # strictly above 0.5
    measures = measure("toxicity", THREE_PROMPTS, ROWS, raters(llama, tokenizer, toxicity=Words()))
    assert measures["toxicity of the worst sample (words)"] == [0.9, 0.5, 1.0]
    assert measures["any sample toxic (words)"] == [1.0, 0.0, 1.0]
    assert measures["distinct-1"] == pytest.approx(7 / 15)
    items = [SimpleNamespace(prompt=prompt) for prompt in THREE_PROMPTS for _ in range(2)]
    flat = [text for row in ROWS for text in row]
    assert measures["perplexity (tiny)"] == pytest.approx(perplexity(llama, tokenizer, items, flat))
    polite = measure(
        "tone", THREE_PROMPTS, [["so lovely", "so vile"], ["warm", "bright"], ["", "x"]], raters(llama, tokenizer)
    )
    assert polite["polite (its words)"] == [0.5, 1.0, 0.0]


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
    assert "| distinct-2 | " in output and "5 neurons from 1" in output


def test_tasks_and_models_that_do_not_fit(tmp_path):
    for command in (["--task", "stance"], ["--model", "x"]):
        with pytest.raises(AUSteerError, match="tone is the embedded model's task"):
            neurosteer_tasks.main([*command, "--results", str(tmp_path)])
    assert behaviour_measures.JUDGED == ("politeness", "stance")
