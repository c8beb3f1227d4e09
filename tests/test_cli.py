"""The command lines as a user meets them: good runs, and one clear line for every wrong input."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS

import MFU_screening
import set_MFU
from austeer.errors import run_command
from austeer.pairs import Pair, write_pairs
from austeer.plan import Plan
from austeer.ranks import AURanks

ROOT = Path(__file__).parents[1]
MAIN = {"MFU_screening.py": MFU_screening.main, "set_MFU.py": set_MFU.main}


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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_pairs(folder / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    return folder


def rank(checkpoints, workplace, *extra, model=None, pairs=None, out="ffn.safetensors"):
    return run("MFU_screening.py", "--model", model or checkpoints["llama"], "--pairs", pairs or workplace / "pairs.jsonl",
               "--out", workplace / out, "--device", "cpu", *extra)  # fmt: skip


def test_rank_then_plan(checkpoints, workplace):
    done = rank(checkpoints, workplace, "--authors-files", workplace / "theirs")
    assert done.returncode == 0, done.stderr
    assert "3 x 48 AUs at site ffn, 16 pairs, " in done.stdout and "pairs/s" in done.stdout
    assert "screening" not in done.stderr, "a bar is for a terminal"
    again = rank(checkpoints, workplace)
    assert again.returncode == 0 and "already there" in again.stdout
    later = rank(checkpoints, workplace, "--authors-files", workplace / "later")
    assert later.returncode == 0 and (workplace / "later" / "ffn" / "all_scores.pt").exists()
    shorter = rank(checkpoints, workplace, "--max-length", "30")
    assert shorter.returncode == 1 and "differs in max_length" in shorter.stderr
    differs = rank(checkpoints, workplace, "--momentum", "causal")
    assert differs.returncode == 1 and "differs in momentum" in differs.stderr
    assert rank(checkpoints, workplace, "--momentum", "causal", out="causal.safetensors").returncode == 0

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
    (workplace / "gpt2").mkdir(exist_ok=True)
    (workplace / "gpt2" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    for name, text in (("empty.jsonl", ""), ("broken.jsonl", '{"prompt": "p", "positive": "a", "negative": "b"}\n{"prompt":\n'),
                       ("equal.jsonl", '["p", "a", "a"]\n'), ("long.jsonl", json.dumps(["p", "a" * 300, "b"]))):  # fmt: skip
        (workplace / name).write_text(text)
    (workplace / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    return [
        (dict(model=workplace / "gpt2"), "no patched family for model type 'gpt2'; there are llama, gemma2"),
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
        done = rank(checkpoints, workplace, **{"out": "new.safetensors", **arguments})
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
        done = rank(checkpoints, workplace, *options, out="new.safetensors")
        assert done.returncode == 1 and message in done.stderr and not (workplace / "new.safetensors").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = run("MFU_screening.py", "--model", checkpoints["llama"], "--pairs", workplace / "pairs.jsonl", "--out",
               workplace / "new.safetensors", "--device", "cuda")  # fmt: skip
    assert cuda.returncode == 1 and "no CUDA device here" in cuda.stderr


@pytest.mark.parametrize("script", MAIN)
def test_help(script):
    done = run(script, "--help")
    assert done.returncode == 0 and len(done.stdout) > 800


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


KILLED = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from errors import run_command
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
