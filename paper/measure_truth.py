"""Ask of your model which scores of single AUs tell the truth: what steering each of them alone really changes.

python main.py truth --model M --pairs mine.jsonl                    at the doses of a plan that costs 0.03 nats of KL
python main.py truth --model M --data_name copa --plan plan.safetensors

The 200 strongest AUs of every score are scaled one by one, at dose 1 and at the plan's dose, and judged on pairs held out
from ranking. A killed run continues where it was. docs/truth.md explains the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError, run_command
from austeer.identity import fingerprint
from austeer.plan import Plan
from austeer.ranks import AURanks
from eval.tasks.registry import PAPER_TASKS
from experiments.bench import BENCHES, Bench
from experiments.cell import bench_of
from experiments.costs import fisher_of
from experiments.ranking import make_ranks, ranks_of
from experiments.store import Store
from MFU_screening import TEMPERED
from paper import truth
from paper.studies import picture
from set_MFU import set_MFU

SITES = ("attention", "neuron")
HEAD = f"  {'score':<38} AUs  ρ, scored on ranking pairs   on the judged   slope   same way   lies   halves"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    model, task = bench_of(
        model=args.model, weights=args.weights, device=args.device, dtype=args.dtype, quick_proof=args.quick_proof,
        task=args.pairs or args.data_name, fields=tuple(args.fields), data_dir=args.data_dir,
    )  # fmt: skip
    folder = Path(args.results)
    bench = BENCHES.open(model, task, Store(ranks=str(folder / "AU_ranks"), records=str(folder / "records")))
    given = Plan.load(args.plan) if args.plan else None
    sites = tuple(args.site or (given.sites if given else SITES))
    to_flag = _to_flag(args.flag, bench, sites)
    settings = truth.Settings(sites, args.top, args.n, (0.1, 1.0) if args.all else (1.0,), seed=args.seed)
    for momentum in (TEMPERED, "activation"):
        make_ranks(bench, momentum, sites)
    plan = given or _plan_of_cost(bench, sites, args.kl)
    print(plan.summary(), flush=True)
    study = truth.Study.of(bench, plan, settings, folder / "truth")
    on_judged = truth.slopes(study, "judged", study.judged)
    by_score = truth.scores(study, truth.slopes(study, "ranking", study.ranking))
    chosen = truth.selections(study, by_score)
    for site in settings.sites:
        runs = {run for selection in chosen if selection.site == site for run in selection.runs}
        aus = len({run[:2] for run in runs})
        print(f"{site}: {len(runs)} changes of {aus} AUs, on {len(study.judged)} held-out pairs", flush=True)
    print("\n".join(f"{name} pairs: {note}" for name, note in study.record["notes"].items()), flush=True)
    own = [selection for selection in chosen if selection.by == truth.PLAN]
    truth.run(study, own, progress=True)
    study.record["correction"] = truth.correct(study, own, on_judged["gradient"])
    for file, ranks in to_flag.items():
        flag(ranks, study.record["correction"]["rows"]).save(Path(args.out) / Path(file).name)
    print(
        "\n".join([*_table(truth.compare(study, own, by_score, on_judged)), *_corrections(study.record["correction"])]),
        flush=True,
    )
    others = [selection for selection in chosen if selection.by != truth.PLAN]
    truth.run(study, others, progress=True)
    study.record["rows"] = truth.compare(study, chosen, by_score, on_judged)
    study.save()
    print("\n".join(_table([row for row in study.record["rows"] if row["by"] != truth.PLAN])))
    path = folder / f"truth-{Path(args.model).name}-{task.label}.png"
    _draw(study, others, by_score, path)
    print(f"picture: {path}   record: {study.path}")


def _plan_of_cost(bench: Bench, sites: Sequence[str], kl: float) -> Plan:
    ranks = [ranks_of(bench, TEMPERED, site) for site in sites]
    return set_MFU(ranks, kl=kl, fisher=fisher_of(bench, sites), model=bench.model)


def _to_flag(files: Sequence[str], bench: Bench, sites: Sequence[str]) -> dict[str, AURanks]:
    """Read the ranks that are to be flagged; refuse those of other weights or sites, and those that no budget is made from."""
    found = {file: AURanks.load(file) for file in files}
    for file, ranks in found.items():
        if ranks.header.get("fingerprint") != fingerprint(bench.model):
            raise AUSteerError(f"{file} has the ranks of other weights than {bench.model_spec.name}: rank this model")
        if "gradients" not in ranks.stats:
            raise AUSteerError(
                f"{file} keeps no gradients, so no plan of a stated cost is made from it: flags have no use there"
            )
        if ranks.site not in sites:
            raise AUSteerError(f"{file} has the ranks of site {ranks.site}, which is not checked: name it with --site")
    return found


def flag(ranks: AURanks, rows: Sequence[dict]) -> AURanks:
    """Return the ranks with the AUs of their site flagged that a check has found to lie."""
    lies = ranks.lies.clone()
    for row in rows:
        if row["site"] == ranks.site:
            for layer, dim in row["lies"]:
                lies[layer, dim] = True
    return replace(ranks, stats=ranks.stats | {"lies": lies})


def _table(rows: Sequence[dict]) -> list[str]:
    """List for each site and dose how well the scores predict the changes of the strongest AUs."""
    lines = []
    for site, dose, of_plan in dict.fromkeys((row["site"], row["dose"], row["by"] == truth.PLAN) for row in rows):
        whose = "the plan's strongest AUs" if of_plan else "each score's strongest AUs"
        where = {truth.WITHIN: truth.WITHIN, truth.PLAN: "alone, at the plan's dose"}.get(
            dose, f"alone, at dose {dose}"
        )
        lines += ["", f"{site}, {whose}, {where}", HEAD]
        lines += [
            _line(row) for row in rows if (row["site"], row["dose"], row["by"] == truth.PLAN) == (site, dose, of_plan)
        ]
    return lines


def _corrections(found: dict) -> list[str]:
    """Report how often first order fails for the plan's AUs, and how well corrected predictions match the judged changes."""
    lines = []
    for row in found["rows"]:
        lines += [
            "",
            f"{row['site']}: first order lies about {len(row['lies'])} of the plan's {row['of']} strongest AUs, checked on "
            f"{found['pairs']} ranking pairs by {row['forwards']:.0f} forwards of one text",
        ]
        lines.append(
            f"  the gradient on the judged pairs, corrected by this check: ρ {_interval(row['corrected']['rho'])}"
        )
    changes = f"the plan {found['plan']:+.5f}, without the AUs that lie {found['reduced plan']:+.5f}"
    return [*lines, "", f"change of the objective on the judged pairs: {changes}"]


def _line(row: dict) -> str:
    ranking, judged = row["ranking"], row.get("judged")
    in_nats = judged is not None
    cells = [
        f"  {truth.SCORES[row['score']]:<38} {row['n']:>3}  {_interval(ranking['rho']):<26}",
        f"{judged['rho'][0]:>+13.2f}" if in_nats else f"{'-':>13}",
        f"{judged['slope']:>8.2f}" if in_nats else f"{'-':>8}",
        f"{100 * ranking['same_way']:>8.0f} %",
        f"{100 * judged['lies']:>4.0f} %" if in_nats else f"{'-':>6}",
        f"{row['halves']:>+8.2f}",
    ]
    return " ".join(cells)


def _interval(rho: Sequence[float]) -> str:
    value, low, high = rho
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _draw(study: truth.Study, chosen: Sequence[truth.Selection], by_score: dict, path: Path) -> None:
    """Draw the change against each score's prediction: a column per score, a row per site and dose."""
    rows = list(dict.fromkeys((selection.site, selection.dose) for selection in chosen))
    columns = list(by_score)
    figure, axes = picture.subplots(len(columns), (3.6 * len(columns), 3.4 * len(rows)), rows=len(rows), squeeze=False)
    agreements = {
        (row["site"], row["dose"], row["by"]): row for row in study.record["rows"] if row["by"] == row["score"]
    }
    for selection in chosen:
        axis = axes[rows.index((selection.site, selection.dose)), columns.index(selection.by)]
        predicted = [
            float(by_score[selection.by][selection.site][run.layer, run.dim]) * run.dose for run in selection.runs
        ]
        change = truth.true_changes(study, selection).mean(1).numpy()
        axis.axhline(0, color=picture.GREY, lw=0.8)
        axis.axvline(0, color=picture.GREY, lw=0.8)
        axis.scatter(predicted, change, 18, color=picture.BLUE, alpha=0.6)
        rho = agreements[selection.site, selection.dose, selection.by]["ranking"]["rho"]
        axis.set_title(f"{truth.SCORES[selection.by]}\nρ {_interval(rho)}", fontsize=11)
        axis.set_xlabel("score times dose", fontsize=10)
        axis.tick_params(labelsize=9)
        axis.locator_params(axis="x", nbins=4)  # small numbers are wide labels
        axis.grid(alpha=0.25)
    for row, (site, dose) in enumerate(rows):
        dose = "the plan's dose" if dose == truth.PLAN else f"dose {dose}"
        axes[row, 0].set_ylabel(f"{site}, {dose}:\nchange in nats", fontsize=10)
    figure.suptitle(f"{study.record['task']}: each AU alone, on {len(study.judged)} held-out pairs", fontsize=15)
    picture.save(figure, path)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parents = [arguments.model_options(), arguments.pairs_options(required=False)]
    parser = arguments.parser("main.py truth", __doc__, parents=parents)
    add = parser.add_argument
    add("--data_name", choices=list(PAPER_TASKS), metavar="TASK",
        help=f"instead of --pairs a task: {', '.join(PAPER_TASKS)}")  # fmt: skip
    add("--data-dir", help="folder of the tasks' datasets (default: datasets/, then the hub)")
    add("--plan", metavar="FILE",
        help="plan whose gates are the doses; it may scale AUs but not shift them (default: one is made that costs --kl)")  # fmt: skip
    add(
        "--kl", type=float, default=0.03, help="cost of the plan that is made, in nats per token (default: %(default)s)"
    )
    add("--site", nargs="+", choices=rmodels.SITES,
        help=f"sites of the AUs (default: those of the plan, or {' '.join(SITES)})")  # fmt: skip
    add("--top", type=int, default=200, help="AUs that are the strongest by each score (default: %(default)s)")
    add("--n", type=int, default=32, help="at most this many held-out pairs (default: %(default)s)")
    add("--all", action="store_true", help="also at dose 0.1")
    add("--flag", nargs="+", default=[], metavar="RANKS", help="copy these causal ranks into the folder --out and mark the "
        "AUs whose first-order prediction fails; plans of a stated cost then leave them out")  # fmt: skip
    add("--out", metavar="FOLDER", help="folder for the copies that --flag makes")
    add("--seed", type=int, default=0, help="seed of the random score (default: %(default)s)")
    add("--results", default="results", help="folder for ranks, records and pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.pairs) == bool(args.data_name):
        raise AUSteerError("give either --pairs, a file of contrastive pairs, or --data_name, a task")
    if bool(args.flag) != bool(args.out):
        raise AUSteerError(
            "--flag and --out belong together: the ranks to flag, and the folder for their flagged copies"
        )
    for name in ("top", "n"):
        if getattr(args, name) < 2:
            raise AUSteerError(f"--{name} must be at least 2, not {getattr(args, name)}")
    rmodels.check_device(args.device)
    return args


if __name__ == "__main__":
    run_command(main)
