"""Compare two ways of estimating the effects of AUs, on pairs that neither the plans nor the test items use.

    python benchmarks/estimates.py --model M --data_name copa-choices --data-dir DIR [--draws 0 1 2] [--out FILE.json]

For each draw of a task's pairs, plans of one cost are made with either estimate of austeer/budget.py. They are judged on
the pairs that the draw leaves over: by the objective, at the temperature of the drawn pairs, and by the share of pairs
whose right answer is the likelier one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from figures import keep, markdown

import rmodels
from austeer import arguments
from austeer.budget import Budget
from austeer.errors import run_command
from austeer.fisher import measure_fisher
from austeer.kl import KLMeter
from austeer.neutral import neutral_text
from austeer.objective import Objective
from austeer.temperature import Temperature
from eval.statistics import t_interval
from eval.tasks.registry import PAPER_TASKS, paper_task
from MFU_screening import TEMPERED, screen

ESTIMATES = {  # in the table -> options of a budget
    "bound, z 1": {"estimate": "bound", "z": 1.0},
    "discriminant, ridge 0.3": {"estimate": "discriminant", "ridge": 0.3},
    "discriminant, ridge 1": {"estimate": "discriminant", "ridge": 1.0},
    "discriminant, ridge 3": {"estimate": "discriminant", "ridge": 3.0},
}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    model = rmodels.load(args.model, dtype=args.dtype, device=args.device, weights=args.weights, quick_proof=True)
    tokenizer = rmodels.load_tokenizer(args.model, weights=args.weights)
    fisher = measure_fisher(model, args.site, neutral_text(tokenizer, args.neutral))
    meter, rows = KLMeter(model, fisher.measure), []
    for draw in args.draws:
        task = paper_task(args.data_name, data_dir=args.data_dir, n_pairs=args.n_pairs, pairs_draw=draw)
        by_site = screen(task.pairs, model, tokenizer, args.site, momentum=TEMPERED, groups=task.groups)
        ranks = [by_site[site] for site in args.site]
        judged = Objective(model, tokenizer, task.left_over, Temperature.of_header(ranks[0].header))
        before = judged.log_odds({site: one.score * 0 for site, one in by_site.items()})
        for name, options in ESTIMATES.items():
            plan = Budget(ranks, fisher, **options).plan(args.kl, meter=meter)
            after = judged.log_odds(plan.scales)
            gain = judged.of_log_odds(after) - judged.of_log_odds(before)
            rows.append({
                "estimate": name, "draw": draw, "pairs left over": len(judged), "k": plan.header["k"],
                "measured_kl": plan.header["measured_kl"], "predicted_gain": plan.header["predicted_gain"],
                "objective": float(gain.mean()),
                "accuracy": 100 * float((after > 0).double().mean() - (before > 0).double().mean()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    print(f"\n{_table(rows)}")
    keep({"model": fisher.header["model"], "task": args.data_name, "kl": args.kl, "rows": rows}, args.out)


def _table(rows: Sequence[dict]) -> str:
    head = [
        "estimate",
        "predicted gain",
        "gain of the objective, each draw",
        "mean",
        "points, each draw",
        "mean [95 %]",
    ]
    lines = []
    for name in ESTIMATES:
        own = [row for row in rows if row["estimate"] == name]
        gains, points = ([row[key] for row in own] for key in ("objective", "accuracy"))
        spread = " [{:+.1f}, {:+.1f}]".format(*t_interval(points)[1:3]) if len(points) > 1 else ""
        lines.append([
            name, f"{mean(row['predicted_gain'][0] for row in own):+.4f}",
            ", ".join(f"{gain:+.4f}" for gain in gains), f"{mean(gains):+.4f}",
            ", ".join(f"{point:+.1f}" for point in points), f"{mean(points):+.1f}{spread}",
        ])  # fmt: skip
    return markdown(head, lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[arguments.model_options()]
    )
    add = parser.add_argument
    add("--data_name", required=True, choices=list(PAPER_TASKS), metavar="TASK", help=", ".join(PAPER_TASKS))
    add("--data-dir", help="folder of the tasks' datasets (default: datasets/, then the hub)")
    add("--site", nargs="+", default=["attention", "neuron"], choices=rmodels.SITES)
    add("--n-pairs", type=int, default=400, help="pairs of each draw (default: %(default)s)")
    add("--draws", nargs="+", type=int, default=[0, 1, 2], help="seeds of the draws (default: 0 1 2)")
    add("--kl", type=float, default=0.03, help="budget of the plans (default: %(default)s)")
    add("--neutral", type=Path, help="file of neutral text (default: the project's prose)")
    add("--out", type=Path, help="also save the figures, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
