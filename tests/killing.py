"""Kills `main.py reproduce` with SIGKILL at random moments, resumes it, and compares what comes out with a run left alone.

python tests/killing.py [--times 20] [--only table12,figure11] [--limit 20] [--seed 0]
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(folder, arguments):
    command = [sys.executable, "main.py", "reproduce", "--results", str(folder), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(run):
    """The run and its workers, as an out-of-memory killer or a power cut would."""
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def outcome(folder):
    """Every table and picture."""
    made = folder / "embedded"
    return {path.name: path.read_bytes() for path in [made / "report.md", *sorted((made / "figures").iterdir())]}


def killed_and_whole(folder, arguments, times, seed):
    """What a run left alone and one that was killed so many times end in, and how many kills met a run."""
    begun = time.monotonic()
    assert start(folder / "whole", arguments).wait() == 0
    seconds, moments, met = time.monotonic() - begun, random.Random(seed), 0
    for _ in range(times):
        run = start(folder / "killed", arguments)
        # a run that goes on is shorter than a whole one: moments near its begin and near its end both occur
        time.sleep(moments.uniform(0.1, 0.7) * seconds)
        met += run.poll() is None
        kill(run) if run.poll() is None else None
    assert start(folder / "killed", arguments).wait() == 0
    return outcome(folder / "whole"), outcome(folder / "killed"), met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", default="table12,figure11")
    parser.add_argument("--limit", default="20")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--only", args.only, "--limit", args.limit]
        whole, killed, met = killed_and_whole(Path(folder), arguments, args.times, args.seed)
    different = sorted(name for name in {*whole, *killed} if whole.get(name) != killed.get(name))
    print(
        f"{args.times} kills, {met} of them met a run under way; {len(whole)} tables and pictures, {len(different)} differ"
    )
    sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    main()
