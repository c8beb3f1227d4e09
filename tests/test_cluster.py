"""Cells over a Ray cluster: the records of a plain run, whatever is killed and whatever fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from one_cell import embedded_cell, store_in
from samples import without_chance

import main
from austeer.errors import AUSteerError
from experiments.executors.base import run_cells
from experiments.executors.over_ray import RayExecutor

ROOT = Path(__file__).parents[1]


def records_in(results):
    return {file.name: without_chance(json.loads(file.read_text())) for file in (results / "records").glob("*.json")}


def computing_workers(parent):
    """Return Ray's workers that compute a cell, of all the processes under this one."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in lines.splitlines()]
    descendants, new = set(), {str(parent)}
    while new:
        descendants |= new
        new = {pid for pid, above, *_ in rows if above in new}
    return [int(pid) for pid, _, name in rows if pid in descendants and name.startswith("ray::_in_folder")]


@pytest.mark.slow
def test_a_worker_killed_in_mid_run(tmp_path):
    def command(results, *more):
        return [sys.executable, "main.py", "--data_name", "svamp", "--limit", "120", "--draws", "2", "--device", "cpu",
                "--applied_module", "ffn", "--results", str(results), "--path", str(results / "ranks"), *more]  # fmt: skip

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "ray", "--ray", "local", "--jobs", "2"), cwd=ROOT, env=env)
    deadline, killed = time.monotonic() + 300, []
    while process.poll() is None and time.monotonic() < deadline:
        if not killed and len(records_in(tmp_path / "ray")) >= 2:
            killed = computing_workers(process.pid)[:1]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert killed and process.wait(1) == 0
    subprocess.run(command(tmp_path / "plain", "--jobs", "1"), cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    assert records_in(tmp_path / "ray") == records_in(tmp_path / "plain")
    table, plain = ((tmp_path / folder / "embedded-svamp.md").read_text() for folder in ("ray", "plain"))
    assert table == plain


@pytest.mark.slow
def test_what_fails_is_said_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    few = {"task": "svamp", "limit": 20, "ks": [4], "alphas": [1.0], "options": [["sta.sae", "nowhere"]]}
    todo = [
        embedded_cell(**few, method=name, site=site)
        for name, site in (("vanilla", None), ("published", "ffn"), ("sta", "layer"))
    ]
    todo += [
        embedded_cell(**few | {"task": "nothing"}, method="vanilla"),
        embedded_cell(**few | {"task": "nothing"}, method="published", site="ffn"),
    ]
    executor = RayExecutor("local", 2)
    records = dict(run_cells(todo, store_in(tmp_path), executor))
    executor.close()
    assert set(records) == set(todo)
    vanilla, published, sta, *others = (records[cell] for cell in todo)
    assert vanilla["n"] == published["n"] == 20 and "failed" not in {**vanilla, **published}
    assert sta == {"failed": "nowhere is neither a file nor RELEASE/ID of sae-lens; give one of them"}
    assert all("unknown task 'nothing'" in record["failed"] for record in others)
    assert len(records_in(tmp_path)) == 2  # what failed is no record: it is tried again


def test_wrong_calls(monkeypatch, tmp_path):
    with pytest.raises(AUSteerError, match="--ray assigns devices itself"):
        main.main(["--ray", "local", "--device", "cuda:1", "--results", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # put back afterwards
    with pytest.raises(AUSteerError, match=r"--ray needs Ray: pip install -r requirements2\.txt"):
        RayExecutor("local")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
