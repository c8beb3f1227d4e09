"""The command lines as a user meets them: good runs, and one clear line for every wrong input."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS

import rmodels
from austeer import steering
from austeer.commands import COMMANDS, plan, rank
from austeer.commands import main as austeer_command
from austeer.commands.steer import greedy_answer, side_by_side, text_inputs
from austeer.errors import AUSteerError, run_command
from austeer.pairs import Pair, write_pairs
from austeer.plan import Plan
from austeer.ranks import AURanks

ROOT = Path(__file__).parents[1]


def _dispatch(name, argv):
    return austeer_command([name, *argv])


MAIN = {
    "MFU_screening.py": rank.main,
    "set_MFU.py": plan.main,
    **{f"austeer {name}": partial(_dispatch, name) for name in COMMANDS},
}


def run(script, *arguments):
    """The script's body with its exit code and output; in this process, as an import of torch takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        run_command(lambda: MAIN[script]([str(argument) for argument in arguments]))
    code = stopped.value.code
    if isinstance(code, str):  # what the interpreter does with sys.exit("text")
        err.write(code + "\n")
        code = 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def by_hand(model):
    scale = torch.zeros(rmodels.site_shape(model, "ffn"))
    scale[1, :8] = 5.0
    return Plan({"ffn": scale})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_pairs(folder / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    return folder


def rank_by_script(checkpoints, workplace, *extra, model=None, pairs=None, out="ffn.safetensors"):
    return run("MFU_screening.py", "--model", model or checkpoints["llama"], "--pairs", pairs or workplace / "pairs.jsonl",
               "--out", workplace / out, "--device", "cpu", *extra)  # fmt: skip


def test_rank_then_plan(checkpoints, workplace):
    done = rank_by_script(checkpoints, workplace, "--authors-files", workplace / "theirs")
    assert done.returncode == 0, done.stderr
    assert "3 x 48 AUs at site ffn, 16 pairs, " in done.stdout and "pairs/s" in done.stdout
    assert "screening" not in done.stderr, "a bar is for a terminal"
    again = rank_by_script(checkpoints, workplace)
    assert again.returncode == 0 and "already there" in again.stdout
    later = rank_by_script(checkpoints, workplace, "--authors-files", workplace / "later")
    assert later.returncode == 0 and (workplace / "later" / "ffn" / "all_scores.pt").exists()
    shorter = rank_by_script(checkpoints, workplace, "--max-length", "30")
    assert shorter.returncode == 1 and "differs in max_length" in shorter.stderr
    differs = rank_by_script(checkpoints, workplace, "--momentum", "causal")
    assert differs.returncode == 1 and "differs in momentum" in differs.stderr
    assert rank_by_script(checkpoints, workplace, "--momentum", "causal", out="causal.safetensors").returncode == 0

    plan = run(
        "set_MFU.py",
        "--ranks",
        workplace / "ffn.safetensors",
        "--k",
        4,
        "--alpha",
        1.5,
        "--out",
        workplace / "plan.safetensors",
    )
    assert plan.returncode == 0 and plan.stdout.startswith("4 atomic units")
    assert len(Plan.load(workplace / "plan.safetensors")) == 4
    theirs = AURanks.load(workplace / "theirs" / "ffn")
    assert theirs.order.tolist() == AURanks.load(workplace / "ffn.safetensors").order.tolist()


def wrong_inputs(checkpoints, workplace):
    config = json.loads((checkpoints["llama"] / "config.json").read_text())
    (workplace / "bert").mkdir(exist_ok=True)
    (workplace / "bert" / "config.json").write_text(
        json.dumps({**config, "model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    for name, text in (("empty.jsonl", ""), ("broken.jsonl", '{"prompt": "p", "positive": "a", "negative": "b"}\n{"prompt":\n'),
                       ("equal.jsonl", '["p", "a", "a"]\n'), ("long.jsonl", json.dumps(["p", "a" * 300, "b"]))):  # fmt: skip
        (workplace / name).write_text(text)
    (workplace / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    return [
        (dict(model=workplace / "bert"), "BertForMaskedLM is an encoder, which does not continue texts"),
        (dict(model=workplace / "nowhere"), "cannot load model"),
        (dict(model="nobody/nothing"), "cannot load model"),
        (dict(pairs=workplace / "none.jsonl"), "no such file"),
        (dict(pairs=workplace / "empty.jsonl"), "holds no pairs"),
        (dict(pairs=workplace / "broken.jsonl"), "broken.jsonl, line 2: not JSON"),
        (dict(pairs=workplace / "equal.jsonl"), "line 1: both answers are 'a'"),
        (dict(pairs=workplace / "long.jsonl"), "longer than the context"),
        (dict(out="cut.safetensors"), "damaged"),
    ]


def test_wrong_inputs_get_one_clear_line(checkpoints, workplace):
    for arguments, message in wrong_inputs(checkpoints, workplace):
        done = rank_by_script(checkpoints, workplace, **{"out": "new.safetensors", **arguments})
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1 and message in errors[0], (arguments, done.stderr[-600:])
        assert not (workplace / "new.safetensors").exists()


def test_wrong_options(checkpoints, workplace, monkeypatch):
    ranks = workplace / "ffn.safetensors"
    for options, message in (
        (["--k", "0", "--alpha", "1"], "k must be a whole number from 1 to 144"),
        (["--k", "145", "--alpha", "1"], "k must be a whole number from 1 to 144"),
        (["--k", "3", "--alpha", "nan"], "alpha must be a finite number"),
        (["--k", "3", "--alpha", "inf"], "alpha must be a finite number"),
    ):
        done = run("set_MFU.py", "--ranks", ranks, *options)
        assert done.returncode == 1 and message in done.stderr
    for options, message in (
        (["--batch-size", "0"], "batch size must be at least 1"),
        (["--max-length", "257"], "from 1 to 256 tokens"),
        (["--protocol", "paper", "--batch-size", "4"], "--protocol paper runs one text at a time"),
        (["--out", workplace / "pairs.jsonl" / "x.safetensors"], "cannot write"),
    ):
        done = rank_by_script(checkpoints, workplace, *options, out="new.safetensors")
        assert done.returncode == 1 and message in done.stderr and not (workplace / "new.safetensors").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = run("MFU_screening.py", "--model", checkpoints["llama"], "--pairs", workplace / "pairs.jsonl", "--out",
               workplace / "new.safetensors", "--device", "cuda")  # fmt: skip
    assert cuda.returncode == 1 and "no CUDA device here" in cuda.stderr


@pytest.mark.parametrize("script", MAIN)
def test_help(script):
    done = run(script, "--help")
    assert done.returncode == 0 and len(done.stdout) > 350
    if script.startswith("austeer "):
        assert script in done.stdout, "a command's help says how it is called"


def test_austeer_lists_its_commands(monkeypatch):
    for argv in ([], ["--help"], ["-h"]):
        out = io.StringIO()
        with redirect_stdout(out):
            austeer_command(argv)
        assert all(f"\n  {name} " in out.getvalue() for name in COMMANDS)
    with pytest.raises(AUSteerError, match="no command 'stear'; the commands are rank, fisher, plan, steer"):
        austeer_command(["stear"])


def steer(checkpoints, workplace, *options):
    return run("austeer steer", "--model", checkpoints["llama"], "--device", "cpu", "--max-new-tokens", 6, *options)


def test_steer_shows_answers_without_and_with_a_plan(checkpoints, workplace, llama, tokenizer, monkeypatch):
    plan = by_hand(llama)
    plan.save(workplace / "hand.safetensors")
    with steering.steer(llama, plan):
        steered = greedy_answer(llama, tokenizer, text_inputs(tokenizer, "gave", chat=False), 6)
    unsteered = greedy_answer(llama, tokenizer, text_inputs(tokenizer, "gave", chat=False), 6)
    assert steered != unsteered
    with_types = copy.deepcopy(tokenizer)
    with_types.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert greedy_answer(llama, tokenizer, text_inputs(with_types, "gave", chat=False), 6) == unsteered
    expected = {"prompt": "gave", "unsteered": unsteered, "steered": steered}
    done = steer(checkpoints, workplace, "--plan", workplace / "hand.safetensors", "--json", "--prompt", "gave", "me")
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and first == expected and second["prompt"] == "me"
    (workplace / "prompts.txt").write_text("gave\n\nme\n")
    assert steer(checkpoints, workplace, "--plan", workplace / "hand.safetensors", "--json",
                 "--file", workplace / "prompts.txt").stdout == done.stdout  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("gave\nme"))
    assert steer(checkpoints, workplace, "--plan", workplace / "hand.safetensors", "--json").stdout == done.stdout
    columns = steer(checkpoints, workplace, "--plan", workplace / "hand.safetensors", "--prompt", "gave").stdout
    assert columns.startswith(f"plan: {plan.summary()}\n\n> gave\nunsteered") and "| steered\n" in columns


def test_steer_without_a_plan_or_with_two(checkpoints, workplace):
    for options, message in (
        ([], "give either --plan, or --ranks with --k and --alpha"),
        (["--plan", "p", "--ranks", "r"], "give either --plan, or --ranks with --k and --alpha"),
        (["--ranks", "r", "--k", "3"], "--ranks needs --k and --alpha"),
        (["--plan", "p", "--k", "3"], "--plan does not take --k"),
        (["--plan", "p", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--plan", workplace / "none.safetensors"], "no such file"),
        (["--plan", workplace / "hand.safetensors", "--file", workplace / "none.txt"], "no such file"),
        (["--plan", workplace / "hand.safetensors", "--chat", "--prompt", "gave"], "no chat template"),
    ):
        done = steer(checkpoints, workplace, *options)
        assert done.returncode == 1 and message in done.stderr, (options, done.stderr)


def test_columns_are_wrapped_beside_each_other(monkeypatch):
    monkeypatch.setenv("COLUMNS", "23")
    assert side_by_side("one two three", "four\n\nfive").splitlines() == [
        "unsteered  | steered", "---------- | ----------", "one two    | four", "three      |", "           | five",
    ]  # fmt: skip


def test_a_real_process_exits_with_one_line_and_no_traceback(workplace):
    command = [
        sys.executable,
        "MFU_screening.py",
        "--model",
        "m",
        "--pairs",
        str(workplace / "none.jsonl"),
        "--out",
        "x",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: no such file: {workplace / 'none.jsonl'}\n"


def test_a_reader_that_hangs_up_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m austeer | true; echo $?"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == "" and int(done.stdout) in (0, 128 + signal.SIGPIPE)


KILLED = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from austeer.errors import run_command
half = Path(sys.argv[1])
begun = half.with_name("begun")
def work():
    begun.touch()
    time.sleep(60)
def main():
    try:
        half.touch()
        with ProcessPoolExecutor(1) as pool:
            for _ in range(3):
                pool.submit(work)
            while not begun.exists():
                time.sleep(0.01)
            print("at work", flush=True)
            time.sleep(60)
    finally:
        half.unlink()
run_command(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_killed_command_cleans_up_at_once(tmp_path, number):
    started = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "half"], cwd=ROOT, stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"at work\n" and (tmp_path / "half").exists()
    started.send_signal(number)
    assert started.wait(20) == 128 + number
    assert not (tmp_path / "half").exists()


def test_nohup_goes_on(tmp_path):
    code = KILLED.replace("SIG_DFL", "SIG_IGN").replace("touch()\n    time.sleep(60)", "touch()")
    code = code.replace("time.sleep(60)\n    finally", "time.sleep(0.2)\n    finally")
    started = subprocess.Popen([sys.executable, "-c", code, tmp_path / "half"], cwd=ROOT, stdout=subprocess.PIPE)
    started.stdout.readline()
    started.send_signal(signal.SIGHUP)
    assert started.wait(20) == 0
