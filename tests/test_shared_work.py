"""Several processes at one cell: the records of one process alone, whatever fails, stops or goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from experiments.setting import Cell, Setting
from samples import without_chance, write_datasets

from austeer import processes as shared_work
from austeer.errors import AUSteerError
from austeer.methods import austeer
from eval.answering import answers as answering
from experiments import run_cell as cells

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def in_processes(count, do):
    """`do` in forks of this process that find each other as those of `accelerate launch` do."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                of_all = {
                    "WORLD_SIZE": count,
                    "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                mine = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
                os.environ.update({name: str(value) for name, value in {**of_all, **mine}.items()})
                PartialState._reset_state()
                assert shared_work.start("cpu") == "cpu" and not shared_work.alone()
                do(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    failed = False
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                failed = failed or status != 0
                for other in children if status else ():  # as the launcher does
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    assert not failed


@pytest.fixture(scope="module")
def workplace(checkpoints, tmp_path_factory):
    """A tiny model with room for the tasks' prompts in bytes, their data, and a user's pairs."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "model").mkdir()
    for file in checkpoints["llama"].iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = json.dumps({**json.loads(text), "max_position_embeddings": 512}).encode()
        (folder / "model" / file.name).write_bytes(text)
    write_datasets(folder / "data")
    lines = [{"prompt": f"On day {i} it", "positive": " rained", "negative": " snowed"} for i in range(40)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def setting_of(workplace, task, results):
    where = dict(ranks=str(results / "ranks"), records=str(results / "records"), data_dir=str(workplace / "data"))
    task = str(workplace / "mine.jsonl") if task == "mine" else task
    return Setting(str(workplace / "model"), task, device="cpu", limit=9, toxicity="embedded", **where)


def computed(setting, method="published"):
    cell = Cell(setting, method, "ffn")
    shared_work.together(lambda: cells.prepare(setting, [cell]))
    return cells.attempt(cell)


def found(results):
    """Records and answers, without what another run may differ in."""
    texts = {file.name: without_chance(json.loads(file.read_text())) for file in (results / "records").glob("*.json")}
    return texts | {file.name: file.read_bytes() for file in (results / "answers").glob("*")}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setitem(answering.BATCH_NUMBERS, "cpu", (2**15, 2**15))
    monkeypatch.setitem(austeer.KS, "real", (4,))
    monkeypatch.setitem(austeer.ALPHAS, "real", (1.0, 4.0))


@pytest.mark.parametrize(("task", "count"), [("copa", 2), ("bpo", 3), ("mine", 2)])
def test_several_processes_equal_one(workplace, tmp_path, small_batches, monkeypatch, task, count):
    monkeypatch.setattr("eval.tasks.open_text.BPO.new_tokens", {"": 6})
    asked, of_a_batch = [], answering._batch
    monkeypatch.setattr(answering, "_batch", lambda *batch: asked.append(batch) or of_a_batch(*batch))
    one = computed(setting_of(workplace, task, tmp_path / "one"))
    assert "failed" not in one, one
    files, alone = found(tmp_path / "one"), len(asked)
    asked.clear()
    assert sum(name.endswith(".json") for name in files) == 2  # vanilla's too

    def share(rank):
        # on a node of its own disk, a process but the first finds no ranks, records or answers
        mine = setting_of(workplace, task, tmp_path / ("many" if rank == 0 else f"node-{rank}"))
        told = computed(mine)
        assert without_chance(told) == json.loads(json.dumps(without_chance(one)))
        assert len(asked) < max(alone, 2)  # a share of the batches
        again = computed(mine)
        assert without_chance(again) == without_chance(told)

    in_processes(count, share)
    assert found(tmp_path / "many") == files
    assert not any((tmp_path / f"node-{rank}").exists() for rank in range(1, count))


def test_other_processes_go_on_where_some_were_killed(workplace, tmp_path, small_batches):
    setting = setting_of(workplace, "copa", tmp_path)
    computed(setting)
    whole = found(tmp_path)
    for record in (tmp_path / "records").glob("*published*.json"):
        record.unlink()
    answers = sorted((tmp_path / "answers").glob("*published*"))
    answers[0].write_bytes(answers[0].read_bytes()[:-30])  # torn
    answers[1].unlink()
    in_processes(2, lambda rank: computed(setting))
    assert found(tmp_path) == whole


def test_what_fails_in_one_fails_in_all_and_the_next_goes_on(tmp_path):
    def share(rank):
        def broken():
            if rank == 1:
                raise AUSteerError("no disk")
            return shared_work.each(str, [1, 2, 3])

        with pytest.raises(AUSteerError, match=r"^no disk$" if rank == 1 else "^process 1: no disk$"):
            shared_work.together(broken)
        # also behind the last step that is shared
        late = [shared_work.of_first(lambda: rank)]
        with pytest.raises(ZeroDivisionError if rank == 0 else AUSteerError):
            shared_work.together(lambda: [*late, 1 / rank])
        with pytest.raises(shared_work.FailedTogether, match="out of step: each, of the first, each"):
            shared_work.of_first(lambda: 0) if rank == 1 else shared_work.each(str, [1])
        assert shared_work.together(lambda: shared_work.each(lambda piece: piece**2, range(7))) == [
            piece**2 for piece in range(7)
        ]
        assert shared_work.all_say(True) and not shared_work.all_say(rank == 1)

    in_processes(3, share)


def test_what_is_told(tmp_path):
    def share(rank):
        assert list(shared_work.merged([f"{rank}{i}" for i in range(rank + 1)])) == ["00", "10", "20", "11", "21", "22"]
        value = {"é": [0.1 + 0.2, True, None, float("inf")], "long": "x" * 100_000}
        assert shared_work.of_first(lambda: value if rank == 0 else 1 / 0) == value
        told = shared_work.tensors_of_first({"ffn": torch.arange(6.0).view(2, 3).T + rank})
        assert torch.equal(told["ffn"], torch.arange(6.0).view(2, 3).T) and shared_work.tensors_of_first({}) == {}
        assert shared_work.each(str, []) == [] and shared_work.each(str, [5]) == ["5"]
        with pytest.raises(AUSteerError, match="leave it out"):
            shared_work.start("cuda:1")

    in_processes(3, share)


def test_alone_nothing_is_told():
    assert shared_work.alone() and shared_work.is_first() and shared_work.start("cpu") == "cpu"
    given = object()
    assert shared_work.of_first(lambda: given) is given and shared_work.each(str, [1, 2]) == ["1", "2"]
    assert list(shared_work.merged(iter([given]))) == [given]
    with pytest.raises(ZeroDivisionError):
        shared_work.together(lambda: 1 / 0)


def launched(processes, *arguments):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1",
                    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]  # fmt: skip
    return [*command, "main.py", *map(str, arguments)]


@pytest.mark.slow
def test_launched_killed_and_launched_again(workplace, tmp_path):
    def arguments(results):
        return ["--model", workplace / "model", "--data_name", "svamp", "--data-dir", workplace / "data", "--encoder", "tfidf",
                "--applied_module", "ffn", "--draws", "1", "--k", "4", "--alpha", "1", "4", "--device", "cpu", "--batch-size", "2",
                "--path", tmp_path / "ranks", "--results", results]  # fmt: skip

    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(launched(1, *arguments(tmp_path / "one")), cwd=ROOT, env=env, check=True)
    (tmp_path / "many").mkdir()
    process = subprocess.Popen(launched(2, *arguments(tmp_path / "many")), cwd=ROOT, env=env, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("many/answers/*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wanted = found(tmp_path / "one")
    left = found(tmp_path / "many")
    assert left != wanted
    done = subprocess.run(launched(3, *arguments(tmp_path / "many")), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found(tmp_path / "many") == wanted
    assert done.stdout.count("table: ") == 1
    names = ("model-svamp.md",)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes() for name in names)
