"""The pairwise judge against a server that fails in every way: orders, verdicts, rates, cost, resumption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer

from austeer.errors import AUSteerError
from eval.scoring import judge as judging
from eval.scoring.judge import estimate, judge, length_controlled, verdict, win_rates
from eval.scoring.paid_calls import Limits

ROOT = Path(__file__).parents[1]
KEY = "sk-a-secret-nobody-may-see"
FAST = Limits(at_once=4, per_second=1000, attempts=6, first_wait=0.01, longest_wait=0.02)
PROMPTS = [f"request {i}" for i in range(10)]
OURS = [f"good answer {i}" for i in range(10)]
THEIRS = [f"poor answer {i}" for i in range(10)]


def shown(body):
    """The two answers as the judge sees them."""
    user = body["messages"][1]["content"]
    return [re.search(f"<<< ANSWER {x} >>>\n(.*)\n<<< END OF ANSWER {x}", user, re.S)[1] for x in "AB"]


def likes_good(body):
    a, b = ("good" in answer for answer in shown(body))
    return "C" if a == b else "A" if a else "B"


def completion(choose=likes_good, **changes):
    def answer(body):
        text = choose(body)
        text = f"Some reasons.\n\n[[{text}]]" if text in ("A", "B", "C") else text
        return {"id": "x", "object": "chat.completion", "created": 0, "model": f"{body['model']}-2026", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}, **changes}  # fmt: skip

    return answer


@pytest.fixture
def serve(monkeypatch):
    running = []

    def start(script=(), answer=None):
        running.append(
            FakeServer(answer or completion(), lambda body: body["messages"][1]["content"], script).__enter__()
        )
        monkeypatch.setenv("OPENAI_BASE_URL", f"{running[-1].url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def run(tmp_path, **options):
    return judge(PROMPTS, OURS, THEIRS, "a-judge", tmp_path / "c.jsonl", limits=FAST, **options)


# what is asked and what comes out


def test_both_orders(tmp_path, serve):
    server = serve()
    result = run(tmp_path)
    assert result["outcomes"] == [1] * 10 and result["delta"] == 100 and result["orders"] == "both"
    assert sorted(map(shown, server.bodies)) == sorted([[a, b] for a, b in zip(OURS, THEIRS, strict=True)]
                                                       + [[b, a] for a, b in zip(OURS, THEIRS, strict=True)])  # fmt: skip
    assert all(body["temperature"] == 0 and body["model"] == "a-judge" for body in server.bodies)
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    assert result["usage"] == {"calls": 20, "input_tokens": 2000, "output_tokens": 140} == result["usage_of_this_run"]
    assert result["judge_versions"] == ["a-judge-2026"] and result["temperature"] == ["0"]
    again = run(tmp_path)
    assert again["usage_of_this_run"]["calls"] == 0 and again["usage"]["calls"] == 20
    assert again["outcomes"] == result["outcomes"] and sum(server.seen.values()) == 20

    swapped = judge(PROMPTS, THEIRS, OURS, "a-judge", tmp_path / "c.jsonl", limits=FAST)
    assert swapped["outcomes"] == [-1] * 10 and sum(server.seen.values()) == 20  # the same 20 questions


def test_a_judge_that_favours_a_place_decides_nothing(tmp_path, serve):
    serve(answer=completion(lambda body: "A"))
    result = run(tmp_path)
    assert result["outcomes"] == [0] * 10 and result["inconsistent"] == 10 and result["tie"] == 100


def test_one_order_is_one_call_and_follows_the_prompt(tmp_path, serve):
    server = serve(answer=completion(lambda body: "A"))
    result = run(tmp_path, one_order=True)
    first = [shown(body)[0] for body in server.bodies]
    assert sum(server.seen.values()) == 10 and result["inconsistent"] == 0
    assert 0 < sum("good" in answer for answer in first) < 10  # both orders occur
    assert [f"good answer {i}" in first for i in range(10)] == [outcome == 1 for outcome in result["outcomes"]]
    assert run(tmp_path, one_order=True)["outcomes"] == result["outcomes"]


def test_a_win_and_a_tie_are_a_tie(tmp_path, serve):
    serve(answer=completion(lambda body: "A" if "good" in shown(body)[0] else "C"))
    result = run(tmp_path)
    assert result["outcomes"] == [0] * 10 and result["inconsistent"] == 10


def test_no_verdict_is_counted_and_a_tie(tmp_path, serve):
    def choose(body):
        return "I like both.\n[[A]] or [[B]]" if "request 3" in body["messages"][1]["content"] else likes_good(body)

    server = serve(answer=completion(choose))
    result = run(tmp_path)
    assert result["unparsable"] == 1 and result["outcomes"] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert result["inconsistent"] == 0 and max(server.seen.values()) == 1


def test_equal_answers_are_not_asked_about(tmp_path, serve):
    server = serve()
    result = judge(PROMPTS[:3], ["same ", OURS[1], ""], ["same", THEIRS[1], "\n"], "j", tmp_path / "c", limits=FAST)
    assert result["outcomes"] == [0, 1, 0] and result["identical"] == 2 and len(server.bodies) == 2
    nothing = judge(["p"], ["x"], ["x"], "j", tmp_path / "d", limits=FAST)
    assert nothing["delta"] == 0 and nothing["usage"]["calls"] == 0 and len(server.bodies) == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A is better.\n[[A]]", "A"), ("**Verdict: [[B]]**\n\n", "B"), ("[[C]]", "C"), ("x\n[[A]] [[A]]", "A"),
        ("[[A]]\nSo I chose A.", None), ("[[A]] or [[B]]", None), ("[[D]]", None), ("[A]", None), ("[[a]]", None),
        ("", None), (None, None), ("[[B]] at first\n\nbut in the end [[A]]", "A"),
    ],
)  # fmt: skip
def test_verdicts(text, found):
    assert verdict(text) == found


def test_braces_and_markers_in_answers_do_no_harm(tmp_path, serve):
    server = serve()
    judge(["{a} %s"], ["good {prompt} {0}"], ["[[B]] {b}"], "j", tmp_path / "c", limits=FAST)
    assert sorted(shown(server.bodies[0])) == ["[[B]] {b}", "good {prompt} {0}"]


# the figures


def test_the_worked_example():
    found = win_rates([1] * 90 + [0] * 40 + [-1] * 70)
    assert (found["win"], found["tie"], found["lose"], found["delta"]) == (45.0, 20.0, 35.0, 10.0)
    low, high = found["delta_interval"]
    assert low == pytest.approx(-2.5, abs=1) and high == pytest.approx(22.5, abs=1)  # 10 +- 1.96 * 6.3
    assert found == win_rates([-1] * 70 + [0] * 40 + [1] * 90)
    with pytest.raises(AUSteerError):
        win_rates([])


def test_the_interval_is_the_plain_bootstraps():
    rng, outcomes = np.random.default_rng(1), [1] * 12 + [0] * 5 + [-1] * 8
    plain = [100 * np.mean(rng.choice(outcomes, 25)) for _ in range(20_000)]
    assert win_rates(outcomes)["delta_interval"] == pytest.approx(np.percentile(plain, [2.5, 97.5]).tolist(), abs=4.1)


def test_length_control():
    rng = np.random.default_rng(0)
    differences = rng.normal(40, 100, 4000).round().astype(int)
    x = np.tanh(differences / np.sqrt((differences**2.0).mean()))

    def drawn(a, b):
        return np.where(rng.random(4000) < 1 / (1 + np.exp(-a - b * x)), 1, -1).tolist()

    biased = drawn(0.0, 2.0)  # the judge likes length and nothing else
    assert win_rates(biased)["delta"] > 15 and abs(length_controlled(biased, differences)) < 5
    better = drawn(0.8, 2.0)
    assert length_controlled(better, differences) == pytest.approx(100 * (2 / (1 + np.exp(-0.8)) - 1), abs=5)
    fair = drawn(0.8, 0.0)
    assert length_controlled(fair, differences) == pytest.approx(win_rates(fair)["delta"], abs=3)


def test_length_control_where_there_is_nothing_to_fit():
    assert length_controlled([1, 0, -1, 1], [0, 0, 0, 0]) == pytest.approx(25.0)
    assert length_controlled([1, 1], [5, -3]) == 100.0 and length_controlled([0, 0], [5, -3]) == 0.0
    assert length_controlled([1, -1], [7, 7]) is None
    assert abs(length_controlled([1, 1, -1, -1], [9, 8, -8, -9])) < 1e-3  # length tells all
    assert length_controlled([1, 0, -1], [3, -2, 5]) == pytest.approx(
        -length_controlled([-1, 0, 1], [-3, 2, -5]), abs=1e-3
    )


# the server's faults


@pytest.mark.parametrize("fault", [429, (429, {"Retry-After": "0.2"}), 500, 503, "garbage", "drop", "cut", ("slow", 0.2)],
                         ids=str)  # fmt: skip
def test_every_fault_is_survived_and_paid_once(tmp_path, serve, fault):
    server = serve([fault, "ok", fault, fault])
    assert run(tmp_path)["outcomes"] == [1] * 10
    assert len(server.paid) == 20 and set(server.paid.values()) == {1}
    assert sum(server.seen.values()) == 20 + (0 if fault == ("slow", 0.2) else 3)


def test_every_attempt_is_ours(tmp_path, serve):
    """The library would repeat by itself, unseen and unspaced."""
    server = serve([500, "drop", 429])
    with pytest.raises(AUSteerError, match=r"3 of 20 verdicts failed \(last: .*\); run again to repeat only these"):
        judge(PROMPTS, OURS, THEIRS, "j", tmp_path / "c.jsonl", limits=Limits(1, 1000, attempts=1))
    assert set(server.seen.values()) == {1} and sum(server.paid.values()) == 17


@pytest.mark.parametrize("body", [{}, [], {"choices": []}, {"choices": None}], ids=str)
def test_an_answer_without_a_choice_is_garbage(tmp_path, serve, body):
    server = serve()
    first = []
    server.answer = lambda asked: first.append(1) or (body if len(first) == 1 else completion()(asked))
    assert run(tmp_path)["outcomes"] == [1] * 10


def test_a_server_that_takes_no_temperature(tmp_path, serve):
    """It is told once a call under way, not once a call; the answers are paid once."""
    server = serve()
    plain, refusal = server.arrive, json.dumps({"error": {"message": "Unsupported value", "param": "temperature"}})

    def arrive(body, headers):
        plain(body, headers)
        return ("raw", 400, refusal) if "temperature" in body else "ok"

    server.arrive = arrive
    result = run(tmp_path)
    assert result["outcomes"] == [1] * 10 and result["temperature"] == ["default"]
    with_it = sum("temperature" in body for body in server.bodies)
    assert 1 <= with_it <= FAST.at_once and len(server.bodies) == 20 + with_it
    assert set(server.paid.values()) == {1} and len(server.paid) == 20


@pytest.mark.parametrize(
    ("status", "message"), [(401, "check OPENAI_API_KEY"), (403, "check OPENAI_API_KEY"), (404, "no model a-judge")]
)
def test_refusals_stop_at_once(tmp_path, serve, status, message):
    server = serve([status] * 99)
    with pytest.raises(AUSteerError, match=message):
        run(tmp_path)
    assert len(server.bodies) < 20 and max(server.seen.values()) == 1


def test_no_credit_is_not_a_busy_server(tmp_path, serve):
    server = serve([("raw", 429, '{"error": {"message": "no", "code": "insufficient_quota"}}')] * 99)
    with pytest.raises(AUSteerError, match="no credit left"):
        run(tmp_path)
    assert max(server.seen.values()) == 1


def test_no_key_and_all_known(tmp_path, serve, monkeypatch):
    serve()
    run(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(tmp_path)["delta"] == 100
    with pytest.raises(AUSteerError, match="set OPENAI_API_KEY"):
        judge(["new"], ["a"], ["b"], "j", tmp_path / "c.jsonl", limits=FAST)


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 429, 500, "garbage", "drop"])
def test_the_key_is_nowhere(tmp_path, serve, capfd, fault):
    serve(["ok", *[fault] * 99])
    with pytest.raises(AUSteerError) as raised:
        judge(PROMPTS, OURS, THEIRS, "j", tmp_path / "c.jsonl", limits=Limits(1, 1000, 2, 0.001))
    out, err = capfd.readouterr()
    assert not any(KEY in text for text in (str(raised.value), out, err, (tmp_path / "c.jsonl").read_text()))


def test_rate_and_number_at_once(tmp_path, serve):
    server = serve([("slow", 0.05)] * 20)
    judge(PROMPTS, OURS, THEIRS, "j", tmp_path / "c.jsonl", limits=Limits(3, 40, 2, 0.01))
    assert server.most_at_once <= 3 and server.arrivals[-1] - server.arrivals[0] > 19 / 40 - 0.03


def test_killed_and_resumed_nothing_is_paid_twice(tmp_path, serve):
    """SIGKILL with answers in the file, one line of it torn, and calls under way that the server then drops."""
    server = serve(["ok"] * 7 + ["hold"] * 4)
    program = (
        "from eval.scoring.judge import judge; from eval.scoring.paid_calls import Limits; import sys\n"
        f"judge({PROMPTS}, {OURS}, {THEIRS}, 'a-judge', sys.argv[1], limits=Limits(4, 1000, 6, 0.01))"
    )
    cache = tmp_path / "c.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(cache)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (server.in_flight == 4 and cache.read_bytes().count(b"\n") == 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.release.set()
    while server.in_flight:
        time.sleep(0.01)
    assert sum(server.paid.values()) == 7 == cache.read_bytes().count(b"\n")
    with cache.open("ab") as file:
        file.write(b'{"key": "torn')
    result = run(tmp_path)
    assert result["outcomes"] == [1] * 10 and result["usage_of_this_run"]["calls"] == 13
    assert len(server.paid) == 20 and set(server.paid.values()) == {1}
    assert KEY not in cache.read_text()


# the command


def answers(path, texts, prompts=PROMPTS):
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in zip(prompts, texts, strict=True)))
    return str(path)


def test_the_command(tmp_path, serve, capsys):
    server = serve(
        answer=completion(lambda body: "C" if "request 1\n" in body["messages"][1]["content"] else likes_good(body))
    )
    command = ["--ours", answers(tmp_path / "mine.jsonl", OURS), "--theirs", answers(tmp_path / "base.jsonl", THEIRS),
               "--judge", "big/judge", "--cache", str(tmp_path / "c.jsonl"), "--per-second", "500", "--price", "1", "10"]  # fmt: skip
    judging.main([*command, "--estimate"])
    expected = estimate(PROMPTS, OURS, THEIRS, "big/judge", tmp_path / "c.jsonl")
    said = capsys.readouterr().out
    assert expected["calls"] == 20 and f"20 calls, {expected['input_tokens']:,} tokens in, 6,000 tokens out" in said
    assert f"{(expected['input_tokens'] + 60_000) / 1e6:.2f} in money" in said and not server.bodies

    judging.main(command)
    said = capsys.readouterr().out
    assert "| 90.0 | 10.0 | 0.0 | +90.0 [" in said and "this run: 20 calls, 2,000 tokens in, 140 tokens out" in said
    (file,) = tmp_path.glob("judge-mine-base-*.json")
    result = json.loads(file.read_text())
    assert result["outcomes"] == [1, 0, *[1] * 8] and result["judge"] == "big/judge" and result["ours"] == "mine.jsonl"
    assert not any(text in file.read_text() for text in (KEY, OURS[0], str(tmp_path)))
    judging.main(command)
    assert "to do: about 0 calls" in capsys.readouterr().out and len(server.bodies) == 20
    judging.main([*command, "--one-order"])
    assert len(list(tmp_path.glob("judge-mine-base-*.json"))) == 2 and len(server.bodies) == 20


def test_wrong_files(tmp_path):
    good = answers(tmp_path / "a.jsonl", OURS)
    other = answers(tmp_path / "b.jsonl", OURS, [f"other {i}" for i in range(10)])
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("")
    for theirs, message in [(other, "the same prompts"), (tmp_path / "none.jsonl", "no such file"),
                            (tmp_path / "bad.jsonl", "must have lines"), (tmp_path / "empty.jsonl", "the same prompts")]:  # fmt: skip
        with pytest.raises(AUSteerError, match=message):
            judging.main(["--ours", good, "--theirs", str(theirs), "--cache", str(tmp_path / "c.jsonl")])


def test_the_command_line_shows_no_traceback(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    command = [sys.executable, "-m", "eval.scoring.judge", "--ours", answers(tmp_path / "a.jsonl", OURS), "--theirs",
               answers(tmp_path / "b.jsonl", THEIRS), "--cache", str(tmp_path / "c.jsonl")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the judge needs a key: set OPENAI_API_KEY")
