"""Say a budget, and see what it costs: the predicted and the measured KL of plans, before and after the corrections.

    python main.py pairs copa-choices --data-dir DIR --n-pairs 400 --pairs-draw 0 --out pairs.jsonl
    python benchmarks/budget.py --model M --pairs pairs.jsonl --group-field group [--out FILE.json]

For each site, or sites that share a budget (--site attention neuron attention+neuron), each k (0: chosen by the budget) and each budget: the KL that the Fisher information
predicts along the plan's direction, what its diagonal alone would predict, the KL that is measured at first shot, and the
KL after the corrections, with the forwards they took. Then what a plan takes from pairs that are ranked, in seconds, beside
what a search over strengths takes on 200 validation items, at the time of these pairs' answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import keep, markdown
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer import arguments
from austeer.budget import Budget
from austeer.errors import run_command
from austeer.fisher import measure_fisher
from austeer.kl import KLMeter
from austeer.methods.base import BUDGET, MOST_POINTS, TOGETHER, sites_of
from austeer.neutral import neutral_text
from austeer.pairs import Pair, read_columns, read_pairs
from eval.tasks.likelihood import encoded_items, log_probabilities
from MFU_screening import TEMPERED, screen

GRID, VALIDATION = MOST_POINTS["full"], 200  # points of a grid, and items that each is asked on
SEARCHED = BUDGET["full"]  # a race costs at most a quarter of so many points (docs/methods.md)
TIMED = 64  # pairs


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    model = rmodels.load(args.model, dtype=args.dtype, device=args.device, weights=args.weights, quick_proof=True)
    tokenizer = rmodels.load_tokenizer(args.model, weights=args.weights)
    pairs = read_pairs(args.pairs, args.fields)
    groups = [name for (name,) in read_columns(args.pairs, [args.group_field])] if args.group_field else None
    start = time.perf_counter()
    sites = list(dict.fromkeys(site for sites in args.site for site in sites_of(sites)))
    fisher = measure_fisher(model, sites, neutral_text(tokenizer, args.neutral))
    measured = time.perf_counter()
    ranks = screen(pairs, model, tokenizer, sites, momentum=TEMPERED, groups=groups)
    ranked = time.perf_counter()
    figures = {
        "model": fisher.header["model"], "neutral": fisher.header["neutral"], "pairs": len(pairs),
        "tau": ranks[sites[0]].header["tau"], "seconds of Fisher information": round(measured - start, 1),
        "seconds of ranking": round(ranked - measured, 1), "plans": [],
    }  # fmt: skip
    print("{:<18} {:>6} {:>7}  {:>10} {:>10}  {:>9} {:>9}  {:>10} {:>9}".format(
        "sites", "k", "budget", "predicted", "diagonal", "measured", "ratio", "corrected", "forwards"
    ), flush=True)  # fmt: skip
    meter = KLMeter(model, fisher.measure)
    for together in args.site:
        budget = Budget([ranks[site] for site in sites_of(together)], fisher)
        for k in args.k:
            for kl in args.kl:
                row = _row(budget, meter, kl, k or None)
                figures["plans"].append({"sites": together, "default k": not k, **row})
                print("{:<18} {:>6} {:>7g}  {:>10.5f} {:>10.5f}  {:>9.5f} {:>9.2f}  {:>10.5f} {:>9}".format(
                    together, row["k"], kl, row["predicted"], row["diagonal"], row["measured"], row["ratio"],
                    row["corrected"], row["forwards"],
                ), flush=True)  # fmt: skip
    within = sum(1 / 1.5 <= row["ratio"] <= 1.5 for row in figures["plans"])
    close = sum(abs(row["corrected"] / row["budget"] - 1) <= 0.1 for row in figures["plans"])
    figures |= _searches(model, tokenizer, pairs)
    seconds = [row["seconds"] for row in figures["plans"]]
    print(
        f"seconds: {figures['seconds of Fisher information']:.0f} for the Fisher information, once per model; "
        f"{min(seconds):.0f} to {max(seconds):.0f} for a plan, measured and corrected; "
        f"{figures['seconds of a grid']:.0f} for a grid of {GRID} points, {figures['seconds of a race']:.0f} at most for a race"
    )
    print(
        f"{within} of {len(figures['plans'])} within 1/1.5 to 1.5 at first shot, {close} within 10 % after correction"
    )
    keep(figures, args.out)


def ratios(figures: Sequence[dict]) -> str:
    """Return a table of several models: measured over predicted KL at first shot, and what was reached over what was asked."""
    rows = []
    for one in figures:
        for sites, chosen in dict.fromkeys((plan["sites"], plan["default k"]) for plan in one["plans"]):
            plans = [plan for plan in one["plans"] if (plan["sites"], plan["default k"]) == (sites, chosen)]
            ks = list(dict.fromkeys(str(plan["k"]) for plan in plans))
            cells = [
                [f"{value:.2f}" for value in values]
                for values in (
                    [plan["ratio"] for plan in plans],
                    [plan["corrected"] / plan["budget"] for plan in plans],
                    [plan["measured"] / plan["diagonal"] for plan in plans],
                )
            ]
            rows.append([one["model"], sites, ", ".join(ks), *map(", ".join, cells)])
    budgets = ", ".join(f"{kl:g}" for kl in dict.fromkeys(plan["budget"] for plan in figures[0]["plans"]))
    head = ["model", "sites", "AUs", f"measured / predicted at {budgets}", "corrected / asked", "measured / diagonal"]
    return markdown(head, rows, words=3)


def _searches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the seconds that searches take: every item-run asks which answer of a pair is the likelier one."""
    encoded = encoded_items(pairs[:TIMED], tokenizer, rmodels.context_length(model))
    log_probabilities(model, encoded[:8])  # the first call is slower
    start = time.perf_counter()
    log_probabilities(model, encoded)
    item = (time.perf_counter() - start) / len(encoded)
    whole = GRID * VALIDATION * item
    return {"seconds of a grid": round(whole, 1), "seconds of a race": round(SEARCHED * VALIDATION * item / 4, 1)}


def _row(budget: Budget, meter: KLMeter, kl: float, k: int | None) -> dict:
    plan, passes, start = budget.plan(kl, k), meter.passes, time.perf_counter()
    corrected = budget.plan(kl, plan.header["k"], meter).header
    seconds = time.perf_counter() - start
    diagonals = budget.fisher.diagonal
    diagonal = sum(float((diagonals[site] * scale.square()).sum()) / 2 for site, scale in plan.scales.items())
    predicted, measured = plan.header["predicted_kl"], corrected["measured_at_first"]
    return {
        "k": plan.header["k"], "budget": kl, "predicted": predicted, "error": plan.header["predicted_error"],
        "diagonal": diagonal, "measured": measured, "ratio": measured / predicted, "clipped": plan.header["clipped"],
        "corrected": corrected["measured_kl"], "forwards": meter.passes - passes,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[arguments.model_options(), arguments.pairs_options()],
    )  # fmt: skip
    add = parser.add_argument
    add("--site", nargs="+", default=["attention", "neuron"], choices=[*rmodels.SITES, *TOGETHER])
    add("--k", nargs="+", type=int, default=[100, 0], help="numbers of AUs; 0: chosen by the budget (default: 100 0)")
    add("--kl", nargs="+", type=float, default=[0.003, 0.01, 0.03], help="budgets (default: 0.003 0.01 0.03)")
    add("--group-field", metavar="FIELD", help="field of the pairs that names their group")
    add("--neutral", type=Path, help="file of neutral text (default: the project's prose)")
    add("--out", type=Path, help="also save the figures, as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
