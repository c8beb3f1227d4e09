"""The benchmarks run: in small, or from figures that were measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_gpu_benchmark_on_a_cpu(tmp_path, shape):
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--shape",
        shape,
        "--device",
        "cpu",
        "--asked",
        "8",
        "--screened",
        "8",
    ]
    subprocess.run([*command, "--out", tmp_path / "out.json"], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["screening"]["pairs/s"] > 0 and figures["one-token answers"]["prompts/s"] > 0
    for batch in (1, 32):
        for mode in ("eager", "compiled"):
            ways = figures[f"decoding, batch {batch}, {mode}"]
            assert {"upstream", "idle", "live, attention", "live, ffn", "hot patch", "floor ms"} <= set(ways)


@pytest.mark.slow
def test_table_and_picture_of_the_committed_figures(tmp_path):
    command = [sys.executable, "benchmarks/steering_report.py", RESULTS / "steering-cpu.json", tmp_path / "picture.png"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "| hot patch |" in said and (tmp_path / "picture.png").stat().st_size > 10_000
