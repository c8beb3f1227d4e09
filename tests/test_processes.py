"""Screening shared by several processes: the ranks of one process alone, and what main.py says of accelerate."""

import os
import signal
import socket
import sys
import time
import traceback

import pytest
import torch
from accelerate import PartialState
from conftest import PAIRS

import main
from austeer import processes
from austeer.commands.rank import main as ranking
from austeer.errors import AUSteerError
from austeer.pairs import Pair, write_pairs
from austeer.ranks import AURanks


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def in_processes(count, do):
    """Run `do` in forks of this process that find each other as those of `accelerate launch` do."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                shared = {
                    "WORLD_SIZE": count,
                    "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
                os.environ.update({name: str(value) for name, value in {**shared, **own}.items()})
                PartialState._reset_state()
                assert processes.join("cpu") == "cpu" and not processes.alone()
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


@pytest.mark.parametrize("momentum", ["activation", "causal"])
def test_several_processes_make_the_ranks_of_one(checkpoints, tmp_path, capfd, momentum):
    write_pairs(tmp_path / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    command = ["--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "pairs.jsonl"), "--momentum", momentum]
    command += ["--site", "attention", "ffn", "--device", "cpu", "--out"]
    ranking([*command, str(tmp_path / "one")])
    capfd.readouterr()
    in_processes(3, lambda _: (ranking([*command, str(tmp_path / "three")]), sys.stdout.flush()))
    assert capfd.readouterr().out.count("ffn.safetensors: ") == 1, "the main process alone writes and speaks"
    for site in ("attention", "ffn"):
        one, three = (AURanks.load(tmp_path / folder / f"{site}.safetensors") for folder in ("one", "three"))
        assert three.header == one.header
        if momentum == "activation":
            assert torch.equal(one.score, three.score) and torch.equal(one.order, three.order)
        for name, values in one.stats.items():
            tolerance = 1e-4 * float(values.double().abs().max())  # batches differ, and with them the last digits
            assert torch.allclose(three.stats[name].double(), values.double(), rtol=1e-4, atol=tolerance), name


def test_flags_are_those_of_the_main_process():
    def share(rank):
        assert processes.flags_of_main([rank == 0, rank == 1]) == [True, False]
        assert processes.own_share(range(5)) == range(5)[rank::2] and processes.is_main() == (rank == 0)

    in_processes(2, share)
    assert processes.alone() and processes.is_main() and processes.flags_of_main([False, True]) == [False, True]


def test_main_does_not_run_under_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AUSteerError, match="use --jobs or --ray"):
        main.main(["--data_name", "svamp"])
