"""The command line: compare steering methods, or run one of the other commands.

python main.py [options]             rank, choose, steer, test and compare; --help lists the options
python main.py COMMAND [options]     each has a --help of its own:
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from austeer.errors import AUSteerError, run_command

COMMANDS = {  # name -> module with a main, and what it does
    "reproduce": ("paper.reproduce", "make every table and figure of the paper, and a report (reproduce.sh runs this)"),
    "trace": ("paper.trace", "print the record behind a number of the report, and compute the number again"),
    "effect": (
        "paper.measure_effect",
        "steer single AUs of your model, and compare what they change with their scores",
    ),
    "truth": ("paper.measure_truth", "check which scores of single AUs predict the measured effect of steering them"),
    "readouts": (
        "experiments.readouts",
        "show where a model has skill to steer: what it gets right unsteered, by task and read-out",
    ),
    "fisher": (
        "austeer.commands.fisher",
        "measure what steering a model costs, for plans of a stated cost (set_MFU.py --kl)",
    ),
    "lm-eval": ("experiments.lm_eval_model", "run lm-evaluation-harness on a steered model"),
    "record": (
        "experiments.record_table",
        "enter a method into the table of records, or replay a record (docs/records.md)",
    ),
    "data": ("eval.data.command", "fetch and check the paper's datasets"),
    "pairs": ("eval.data.pairs_command", "make, show and save the contrastive pairs of a task or of your data"),
    "import-authors": ("eval.data.import_authors", "read prompts, data and ranks from the authors' checkout"),
    "restore": ("experiments.restore", "prune a model and give it its lost components back (RestoreLCC)"),
    "neurosteer": (
        "experiments.neurosteer",
        "run NeuroSteer's own tasks: sample texts with and without steering, and measure both",
    ),
    "export": (
        "austeer.export.command",
        "write a plan into a checkpoint's weights or an adapter, and take it out again",
    ),
    "models": (
        "austeer.commands.models",
        "try every model family of the installed transformers: sites, folds, adapters",
    ),
    "toxicity": ("eval.scoring.toxicity_agreement", "measure how far a toxicity scorer agrees with Perspective"),
    "judge": ("eval.scoring.judge", "let a judge model compare two files of answers: their win rate"),
    "human": ("eval.scoring.human", "make blind sheets for human raters, and score what they return"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AUSteerError(
            "main.py does not run under accelerate launch, only MFU_screening.py does: use --jobs or --ray (docs/scaling.md)"
        )
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else (None, argv)
    if name is None and rest[:1] in (["-h"], ["--help"]):
        print(__doc__.rstrip() + "".join(f"\n        {name:<15} {what}" for name, (_, what) in COMMANDS.items()) + "\n")
    # imported on demand, because the comparison needs torch and most commands do not
    return importlib.import_module(COMMANDS[name][0] if name else "experiments.compare").main(rest)


if __name__ == "__main__":
    run_command(main)
