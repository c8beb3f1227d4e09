"""The toxicity scorers, the metric, agreement, and paid calls against a server that fails in every way."""

import json
import os
import threading
import time
from concurrent.futures import as_completed
from datetime import date
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import SHARED, byte_tokenizer, needs_shared
from fake_server import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from austeer.errors import AUSteerError
from embedded import toxicity as embedded_toxicity
from embedded.toxicity import EmbeddedScorer, auroc, best_threshold, flat_rows
from eval.scoring import paid_calls, toxicity, toxicity_agreement
from eval.scoring.paid_calls import Again, AnswerCache, Limits, ask_all, key_of, retry_after
from eval.scoring.toxicity import LocalClassifier, Perspective, detoxified, scorer
from eval.scoring.toxicity_agreement import agreement

KEY = "AIza-a-secret-nobody-may-see"
FAST = Limits(at_once=4, per_second=1000, attempts=6, first_wait=0.01, longest_wait=0.02)
TEXTS = [f"text number {i}" for i in range(12)]


def truth(text):
    return round(len(text) % 10 / 10 + 0.03, 2)


def perspective_answer(body):
    value = truth(body["comment"]["text"])
    spans = [{"begin": b, "score": {"value": v}} for b, v in ((9, 0.99), (0, round(value / 2, 4)))]
    return {"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}, "spanScores": spans}}}


@pytest.fixture
def serve(monkeypatch):
    """serve(script) -> a running fake Perspective that the environment points to."""
    running = []

    def start(script=(), answer=perspective_answer):
        running.append(FakeServer(answer, lambda body: body["comment"]["text"], script).__enter__())
        monkeypatch.setenv("PERSPECTIVE_URL", running[-1].url)
        monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


# the metric


def test_the_worked_example():
    scores = [0.50, 0.51, 0.10, 0.92, 0.49]
    assert detoxified(scores) == [True, False, True, False, True]


@pytest.mark.parametrize("scores", [[float("nan")], [1.5], [-0.1]])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(AUSteerError, match="must lie in"):
        detoxified(scores)


scored = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]), st.booleans()), min_size=1, max_size=25)


@given(scored)
@settings(max_examples=200, deadline=None)
def test_auroc_against_all_pairs(pairs):
    against = [(s > t) + (s == t) / 2 for s, toxic in pairs if toxic for t, other in pairs if not other]
    found = auroc(*zip(*pairs, strict=True))
    assert found == pytest.approx(np.mean(against)) if against else np.isnan(found)


@given(scored)
@settings(max_examples=200, deadline=None)
def test_best_threshold_against_every_threshold(pairs):
    def right(threshold):
        return sum((score > threshold) == toxic for score, toxic in pairs)

    every = [-1.0, *(score for score, _ in pairs), *(score - 1e-3 for score, _ in pairs)]
    assert right(best_threshold(*zip(*pairs, strict=True))) == max(map(right, every))


# Perspective, and the calls


def test_perspective(tmp_path, serve):
    server, texts = serve(), ["a", "", "hello there", " \n", "a"]
    scores = Perspective(tmp_path / "c.jsonl", limits=FAST).scores(texts)
    assert scores == [truth("a"), 0.0, truth("hello there"), 0.0, truth("a")]
    assert server.paid == {"a": 1, "hello there": 1}  # equal texts once, empty ones never
    assert set(server.bodies[0]["requestedAttributes"]) == {"TOXICITY"} and server.bodies[0]["doNotStore"] is True
    assert {h.get("x-goog-api-key") for h in server.headers} == {KEY}

    first = Perspective(tmp_path / "c.jsonl", first_span=True, limits=FAST)
    assert first.scores(["hello there"]) == [truth("hello there") / 2] and server.paid["hello there"] == 1
    assert first.name == "perspective:first-span" != Perspective(tmp_path / "c.jsonl").name


FAULTS = [429, (429, {"Retry-After": "0.2"}), 500, 503, "garbage", "drop", "cut", ("slow", 0.2), 408]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_is_survived_and_paid_once(tmp_path, serve, fault):
    server = serve([fault, "ok", fault, fault])
    assert Perspective(tmp_path / "c.jsonl", limits=FAST).scores(TEXTS) == [truth(text) for text in TEXTS]
    assert server.paid == dict.fromkeys(TEXTS, 1)
    retries = sum(server.seen.values()) - len(TEXTS)
    assert retries == (0 if fault == ("slow", 0.2) else 3)
    Perspective(tmp_path / "c.jsonl", limits=FAST).scores(TEXTS)
    assert sum(server.seen.values()) == len(TEXTS) + retries  # all from the cache


def test_a_wrong_answer_is_garbage(tmp_path, serve):
    bad = iter([{}, [], {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 7}}}}, None])
    serve(answer=lambda body: next(bad, perspective_answer(body)))
    assert Perspective(tmp_path / "c.jsonl", limits=FAST).scores(["x"]) == [truth("x")]


def test_a_final_failure_is_reported_after_the_others(tmp_path, serve):
    server = serve()
    server.answer = lambda body: {} if body["comment"]["text"] in TEXTS[:3] else perspective_answer(body)
    judge = Perspective(tmp_path / "c.jsonl", limits=FAST)
    with pytest.raises(AUSteerError, match=r"3 of 12 Perspective scores failed \(last: .*\); run again to repeat only"):
        judge.scores(TEXTS)
    assert all(server.seen[text] == FAST.attempts for text in TEXTS[:3])
    assert all(server.paid[text] == 1 for text in TEXTS[3:])
    server.answer = perspective_answer
    assert judge.scores(TEXTS) == [truth(text) for text in TEXTS]
    assert all(server.paid[text] == 1 for text in TEXTS[3:])


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "PERSPECTIVE_API_KEY"), (403, "closes on 31 December 2026.*embedded"), (410, "closes.*local:unitary"),
     ((302, {"Location": "http://127.0.0.1:9/"}), "not there")],
)  # fmt: skip
def test_refusals_stop_at_once_and_say_what_to_do(tmp_path, serve, status, message):
    server = serve([status] * 50)
    with pytest.raises(AUSteerError, match=message):
        Perspective(tmp_path / "c.jsonl", limits=FAST).scores(TEXTS)
    assert sum(server.seen.values()) < len(TEXTS) and max(server.seen.values()) == 1


def test_a_refused_text_is_not_repeated_and_does_not_stop_the_others(tmp_path, serve):
    server = serve([400])
    with pytest.raises(AUSteerError, match=r"1 of 12 .* answered 400"):
        Perspective(tmp_path / "c.jsonl", limits=FAST).scores(TEXTS)
    assert sum(server.paid.values()) == 11 and max(server.seen.values()) == 1


def test_no_key(tmp_path, serve, monkeypatch):
    serve()
    Perspective(tmp_path / "c.jsonl", limits=FAST).scores(["x"])
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    assert Perspective(tmp_path / "c.jsonl", limits=FAST).scores(["x"]) == [truth("x")]  # a known answer needs none
    with pytest.raises(AUSteerError, match="set PERSPECTIVE_API_KEY"):
        Perspective(tmp_path / "c.jsonl", limits=FAST).scores(["y"])
    with pytest.raises(AUSteerError, match="set PERSPECTIVE_API_KEY"):
        Perspective(tmp_path / "none yet.jsonl")


def test_after_the_last_day(tmp_path, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls):
            return date(2027, 1, 1)

    monkeypatch.setattr(toxicity, "date", Later)
    monkeypatch.delenv("PERSPECTIVE_URL", raising=False)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    with pytest.raises(AUSteerError, match=r"closed on 31 December 2026: .*embedded"):
        Perspective(tmp_path / "c.jsonl")


@pytest.mark.parametrize("fault", [400, 401, 403, 429, 500, "garbage", "drop"])
def test_the_key_is_nowhere(tmp_path, serve, capfd, fault):
    serve(["ok", *[fault] * 50])
    with pytest.raises(AUSteerError) as raised:
        Perspective(tmp_path / "c.jsonl", limits=Limits(1, 1000, 2, 0.001)).scores(TEXTS)
    shown = capfd.readouterr()
    everything = [str(raised.value), shown.out, shown.err, *(file.read_text() for file in tmp_path.iterdir())]
    assert not any(KEY in text for text in everything)
    assert not any(text in everything[3] for text in TEXTS)  # nor are texts in the cache


def test_the_rate_is_kept_by_repetitions_too(tmp_path, serve):
    server = serve([500] * 5)
    Perspective(tmp_path / "c.jsonl", limits=Limits(8, 25, 8, 0.001, 0.002)).scores(TEXTS)
    times = server.arrivals
    assert len(times) == 17
    for span in (1, 4, 16):  # arrivals waver by a few milliseconds of scheduling
        assert min(b - a for a, b in zip(times, times[span:], strict=False)) > span / 25 - 0.03


def test_retry_after_holds_everyone(tmp_path, serve):
    server = serve(["ok", (429, {"Retry-After": "1"})])
    Perspective(tmp_path / "c.jsonl", limits=Limits(3, 20, 6, 0.001, 0.002)).scores(TEXTS)
    after = [at - server.arrivals[1] for at in server.arrivals[2:]]
    assert len(after) == len(TEXTS) - 1 and min(after) >= 0.99


def test_no_more_at_once_than_allowed(tmp_path, serve):
    server = serve([("slow", 0.05)] * 12)
    Perspective(tmp_path / "c.jsonl", limits=Limits(3, 1000, 2, 0.01)).scores(TEXTS)
    assert server.most_at_once == 3


def test_too_long_a_retry_after_is_a_failure_not_a_night(tmp_path, serve):
    serve([(429, {"Retry-After": "86400"})])
    with pytest.raises(AUSteerError, match="asks to wait 86400 s"):
        Perspective(tmp_path / "c.jsonl", limits=FAST).scores(["x"])


def test_retry_after_as_date_number_or_nonsense():
    assert retry_after("2.5") == 2.5 and retry_after(None) == retry_after("soon") == retry_after("-3") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 < retry_after("Wed, 21 Oct 2099 07:28:00 GMT")


def test_a_torn_last_line_is_dropped_and_a_whole_one_kept(tmp_path):
    path, requests = tmp_path / "c.jsonl", [{"n": n} for n in range(3)]
    with AnswerCache(path) as cache:
        ask_all(requests, lambda request: {"twice": 2 * request["n"]}, cache, Limits(1, 1000))
    whole = path.read_bytes()
    third = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut, asked_again in [(len(whole) - 1, []), (len(whole) - 2, [2]), (third + 1, [2]), (third, [2])]:
        path.write_bytes(whole[:cut])
        asked = []
        with AnswerCache(path) as cache:
            answers = ask_all(requests, lambda r: asked.append(r["n"]) or {"twice": 2 * r["n"]}, cache, Limits(1, 1000))  # noqa: B023
        assert asked == asked_again and [answer["twice"] for answer in answers] == [0, 2, 4]
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_said(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"key": "a", "answer": {}}\n{"key": \n{"key": "b", "answer": {}}\n')
    with pytest.raises(AUSteerError, match=r"line 2 of .* is damaged"):
        AnswerCache(tmp_path / "c.jsonl")


def test_one_file_one_run_at_a_time(tmp_path, capsys):
    """The second waits, and then finds what the first has paid for."""
    first, found = AnswerCache(tmp_path / "c.jsonl"), []

    def second():
        with AnswerCache(tmp_path / "c.jsonl") as cache:
            found.append("key" in cache)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    assert not found and "waiting for another run" in capsys.readouterr().err
    first.add("key", {})
    first.close()
    thread.join(5)
    assert found == [True]


def test_ctrl_c_keeps_what_is_under_way(tmp_path):
    """The first call is interrupted out of the main thread; the second one, under way by then, is kept."""
    started = threading.Event()

    def call(request):
        if request["n"] == 0:
            started.wait(5)
            raise KeyboardInterrupt
        started.set()
        time.sleep(0.2)
        return {}

    with AnswerCache(tmp_path / "c.jsonl") as cache:
        with pytest.raises(KeyboardInterrupt):
            ask_all([{"n": n} for n in range(9)], call, cache, Limits(2, 1000))
        assert key_of({"n": 1}) in cache and key_of({"n": 8}) not in cache


def test_what_stops_the_run_stops_it_before_the_next_call(tmp_path, monkeypatch):
    """Even where the main thread is slow to hear of it."""
    asked = []
    monkeypatch.setattr(paid_calls, "as_completed", lambda futures: time.sleep(0.2) or as_completed(futures))

    def call(request):
        asked.append(request["n"])
        raise AUSteerError("no key")

    with AnswerCache(tmp_path / "c.jsonl") as cache, pytest.raises(AUSteerError, match="no key"):
        ask_all([{"n": n} for n in range(50)], call, cache, Limits(1, 1e9))
    assert asked == [0]


def test_backoff_doubles_up_to_a_bound_and_jitters(tmp_path, monkeypatch):
    draws, times = [], []
    monkeypatch.setattr("random.random", lambda: draws.append(0.0) or 0.0)

    def call(request):
        times.append(time.monotonic())
        raise Again("no")

    with AnswerCache(tmp_path / "c.jsonl") as cache, pytest.raises(AUSteerError, match="1 of 1"):
        ask_all([{}], call, cache, Limits(1, 1000, attempts=5, first_wait=0.05, longest_wait=0.2))
    gaps = [b - a for a, b in pairwise(times)]
    assert draws and len(times) == 5
    assert all(wanted <= gap < wanted + 0.09 for gap, wanted in zip(gaps, (0.05, 0.1, 0.2, 0.2), strict=True))


def test_limits_must_make_sense():
    for wrong in ({"at_once": 0}, {"per_second": 0}, {"attempts": 0}):
        with pytest.raises(AUSteerError):
            Limits(**wrong)


# local classifiers


def classifier(folder, labels, problem_type=None, safe=True):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        problem_type=problem_type, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        os.remove(folder / "model.safetensors")
    return model, tokenizer


LONG = ["b", "a much longer text about the weather", "", "short one", "x" * 100]


@pytest.mark.parametrize(
    ("labels", "problem_type", "given", "index", "kind"),
    [
        (["neutral", "Toxic"], None, "", 1, "softmax"),
        (["toxicity", "fine"], "multi_label_classification", "", 0, "sigmoid"),
        (["toxic", "severe_toxic", "insult"], "multi_label_classification", "", 0, "sigmoid"),
        (["fine", "rude", "toxic"], "single_label_classification", "", 2, "softmax"),
        (["toxicity"], None, "", 0, "sigmoid"),
        (["toxicity"], "regression", "", 0, "regression"),
        (["LABEL_0", "LABEL_1"], None, ":label_1", 1, "softmax"),
    ],
)
def test_a_local_classifier(tmp_path, labels, problem_type, given, index, kind):
    folder = tmp_path / "models" / "tiny"
    model, tokenizer = classifier(folder, labels, problem_type)
    local = scorer(f"local:{folder}{given}", device="cpu")
    expected = []
    for text in LONG:
        logits = model(torch.tensor([tokenizer(text)["input_ids"][:38]])).logits[0].double()
        value = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "regression": logits.clamp(0, 1)}[kind]
        expected.append(value[index].item() if text else 0.0)
    assert local.scores(LONG) == pytest.approx(expected, abs=1e-5)
    assert local.name == f"local:models/tiny:{labels[index]}" and str(tmp_path) not in local.name


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (["LABEL_0", "LABEL_1"], None, r"\(it has LABEL_0, LABEL_1\); name one: local:.*:LABEL"),
        (["LABEL_0"], None, r"\(it has LABEL_0"),
        (["toxic", "a", "b"], None, "does not say whether its 3 labels exclude each other"),
    ],
)
def test_unclear_labels(tmp_path, labels, problem_type, message):
    classifier(tmp_path / "m", labels, problem_type)
    with pytest.raises(AUSteerError, match=message):
        LocalClassifier(str(tmp_path / "m"), "cpu")


def test_a_checkpoint_without_a_head_is_no_classifier(tmp_path):
    """The library would draw the head at random and only warn."""
    model, _ = classifier(tmp_path / "m", ["neutral", "toxic"])
    config = (tmp_path / "m" / "config.json").read_text()
    model.bert.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(config)
    with pytest.raises(AUSteerError, match=r"is not trained: .*classifier\.weight"):
        LocalClassifier(str(tmp_path / "m"), "cpu")


def test_pickled_weights_are_not_read(tmp_path):
    classifier(tmp_path / "m", ["neutral", "toxic"], safe=False)
    with pytest.raises(AUSteerError, match="as safetensors"):
        LocalClassifier(str(tmp_path / "m"), "cpu")


@pytest.mark.parametrize("spec", ["", "perspectiv", "perspective:last", "embedded:x"])
def test_unknown_scorers(spec):
    with pytest.raises(AUSteerError, match="no toxicity scorer"):
        scorer(spec)


# the embedded scorer, and agreement


def invented(count, seed=0):
    """Rows of a harmless world in which only "grumpy" words are toxic; every tenth has no score."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        toxic = rng.random() < 0.5
        words = rng.choice(["table", "lamp", "river", "cloud", "paper"], 6).tolist()
        words += [str(rng.choice(["grumpy", "grumpier", "grump"]))] if toxic else []
        rows.append({"prompt": f"the {words[0]} of day {i}", "prompt_toxicity": 0.05, "continuation": " ".join(words),
                     "continuation_toxicity": None if i % 10 == 9 else (0.9 if toxic else 0.1), "challenging": False})  # fmt: skip
    return rows


def test_training_is_deterministic_and_learns():
    weights, bias, measured = embedded_toxicity.train(invented(120))
    again, bias_again, _ = embedded_toxicity.train(invented(120))
    assert np.array_equal(weights, again) and bias == bias_again
    assert measured["rows"] == 108 and measured["held_out_auroc"] == 1.0
    other = [row for row in invented(100, seed=1) if row["continuation_toxicity"] is not None]
    made = EmbeddedScorer(weights, bias, measured)
    found = made.scores([row["continuation"] for row in other])
    assert [score > 0.5 for score in found] == [row["continuation_toxicity"] > 0.5 for row in other]


def test_the_embedded_scorer_as_shipped():
    shipped = scorer("embedded")
    assert embedded_toxicity.WEIGHTS.stat().st_size < 256 * 1024
    assert shipped.header["rows"] == 1189 and shipped.header["held_out_auroc"] > 0.8
    alone = [shipped.scores([text])[0] for text in LONG]
    assert shipped.scores(LONG) == pytest.approx(alone) and alone[2] == 0.0 and shipped.scores([]) == []
    assert shipped.name.startswith("embedded@")


@needs_shared
def test_the_shipped_weights_are_the_recipes(tmp_path):
    path = tmp_path / "made.safetensors"
    embedded_toxicity.main(["--data-dir", str(SHARED / "data"), "--out", str(path)])
    made, shipped = EmbeddedScorer.load(path), scorer("embedded")
    assert made.header == shipped.header
    assert np.abs(made.weights - shipped.weights).max() < 0.02 and abs(made.bias - shipped.bias) < 0.02


@needs_shared
def test_agreement_of_the_embedded_scorer(capsys):
    toxicity_agreement.main(["--data-dir", str(SHARED / "data")])
    shown = capsys.readouterr().out
    assert "1184 test continuations; Perspective calls 55.4 % toxic" in shown
    line = next(line for line in shown.splitlines() if line.startswith("| embedded@"))
    area, at_half, threshold = (cell.strip() for cell in line.split("|")[2:5])
    assert float(area.split()[0]) > 0.87 and float(at_half.split()[0]) > 79 and threshold == "0.500"


class Fixed:
    name = "fixed"

    def __init__(self, of):
        self.of = of

    def scores(self, texts):
        return [self.of[text] for text in texts]


def test_agreement_by_hand():
    def row(text, value):
        return {"prompt": "", "prompt_toxicity": 0.0, "continuation": text, "continuation_toxicity": value}

    train = [row("a", 0.9), row("b", 0.8), row("c", 0.1), row("d", 0.5)]  # 0.5 is not toxic
    test = [row("e", 0.7), row("f", 0.6), row("g", 0.2), row("h", 0.4), row("i", None)]
    fixed = Fixed({"a": 0.35, "b": 0.4, "c": 0.1, "d": 0.25, "e": 0.9, "f": 0.32, "g": 0.31, "h": 0.4, "i": 1.0})
    found = agreement(fixed, test, train)
    assert (found["n"], found["toxic_share"], found["auroc"]) == (4, 0.5, 0.75)
    assert (found["accuracy"], found["best_threshold"]) == (0.75, pytest.approx(0.3))  # between .25 and .35 of train
    assert found["best_accuracy"] == 0.5  # at .3: e, f right, g, h wrong
    assert found["accuracy_interval"][0] < 0.75 < found["accuracy_interval"][1] == 1.0
    assert found == agreement(fixed, test, train)  # seeded


def test_agreement_needs_both_kinds():
    rows = [{"continuation": "x", "continuation_toxicity": 0.9}]
    with pytest.raises(AUSteerError, match="rows that it did not"):
        agreement(Fixed({"x": 0.1}), rows, rows)


def test_rows_of_the_nested_form(tmp_path):
    (tmp_path / "toxicity").mkdir()
    line = {"prompt": {"text": "a\u2028b", "toxicity": 0.1}, "continuation": {"text": "c", "toxicity": None}}
    path = tmp_path / "toxicity" / "test.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    wanted = {"prompt": "a\u2028b", "prompt_toxicity": 0.1, "continuation": "c", "continuation_toxicity": None}
    assert flat_rows(path) == [{**wanted, "challenging": False}]
    with pytest.raises(AUSteerError, match="no such file"):
        flat_rows(path.with_name("train.jsonl"))
    path.write_text('{"prompt": "flat"}\n')
    with pytest.raises(AUSteerError, match="not RealToxicityPrompts"):
        flat_rows(path)
