"""The command line: the comparison of methods, or one of the commands beside it.

python main.py [options]             rank, choose, steer, test and compare (experiments/compare.py; --help says more)
python main.py COMMAND [options]     each has its own --help:
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from austeer.errors import AUSteerError, run_command

COMMANDS = {  # name: module with a main, and what it does
    "reproduce": ("paper.reproduce", "every table and figure of the paper, and a report (what reproduce.sh runs)"),
    "trace": ("paper.trace", "behind a number of the report: its record, and how to compute it again"),
    "data": ("eval.data.command", "fetch and check the paper's datasets"),
    "pairs": ("eval.data.pairs_command", "make, show and save the contrastive pairs of a task or of your data"),
    "import-authors": ("eval.data.import_authors", "prompts, data and ranks out of the authors' checkout"),
    "restore": (
        "experiments.restore",
        "give a pruned model its lost components back (RestoreLCC): dense, pruned, restored",
    ),
    "neurosteer": (
        "experiments.neurosteer",
        "NeuroSteer's own tasks: sampled texts, steered and not, and their measures",
    ),
    "export": ("austeer.export.command", "a plan into a checkpoint's weights or an adapter, and out again"),
    "toxicity": ("eval.scoring.toxicity_agreement", "how far a toxicity scorer agrees with Perspective"),
    "judge": ("eval.scoring.judge", "win rate of one file of answers against another, by a judge model"),
    "human": ("eval.scoring.human", "blind sheets for human raters, and their scores"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AUSteerError(
            "main.py does not run under accelerate launch: use --jobs or --ray (docs/scaling.md); MFU_screening.py does"
        )
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else (None, argv)
    if name is None and rest[:1] in (["-h"], ["--help"]):
        print(__doc__.rstrip() + "".join(f"\n        {name:<15} {what}" for name, (_, what) in COMMANDS.items()) + "\n")
    # imported on demand: the comparison needs torch, most commands do not
    return importlib.import_module(COMMANDS[name][0] if name else "experiments.compare").main(rest)


if __name__ == "__main__":
    run_command(main)
