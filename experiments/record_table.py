"""Keep a table of the best results, which others can beat: for each model and task, the largest gain at 0.01 nats (docs/records.md).

python main.py record enter --model M --data_name T --method fisher --applied_module attention+neuron --data-dir DIR
python main.py record replay docs/records/FILE.json --data-dir DIR
python main.py record table                                        writes docs/records.md from the files beside it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from austeer import arguments
from austeer.change import Change
from austeer.errors import AUSteerError, run_command
from austeer.files import read_text, write_json, write_text
from austeer.identity import public_name
from austeer.methods.registry import METHODS
from experiments import kl_report, parts_report
from experiments.arguments import check, parents, task_names
from experiments.bench import BENCHES
from experiments.cell import AT_KL, EMBEDDED, Cell, at_kl, cell_of
from experiments.equal_kl import TOLERATED
from experiments.executors.base import run_cells
from experiments.executors.choose import executor_for
from experiments.records import environment, unpack
from experiments.report import LABELS
from experiments.run_cell import RunAtKL, method_of
from experiments.store import Store

FOLDER = Path(__file__).parents[1] / "docs" / "records"
LEVEL, DRAWS, PAIRS, MOST_P = 0.01, (0, 1, 2, 3, 4), 400, 0.01
MOST_DIFFERENT = 0.01  # share of the items that another processor's rounding may answer otherwise
CELL = ("model", "task", "method", "site", "dtype", "test_split")  # what a file says of its cells
KEPT = ("id", "method", "site", "options", "draw", "pairs_hash", "fingerprint", "n", "right", "measure", "outcomes", "test_split",
        "touched", "kl", "settings", "code", "device", "environment")  # fmt: skip
RULES = """1. The gain is measured at {level:g} nats of KL per token of neutral text, within a tenth of that ([budget.md](budget.md)): on
   tasks with two words as options in skill, on tasks by whole choices in accuracy ([tasks.md](tasks.md#what-a-gain-is-made-of)).
2. Five draws of {pairs} ranking pairs, by group, with seeds 0 to 4. Nothing is chosen on test items.
3. p < {p:g} against the unsteered model, by the bootstrap over items and draws ([statistics.md](statistics.md)).
4. A new record has a larger mean gain than the standing one, and the plan or adapter of its first draw lies beside it.
5. `replay` computes the draws again. On the same processor all outcomes must be equal; on another at most {different:.0%} may differ."""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one of the three actions."""
    args = _arguments(argv)
    if args.action == "enter":
        _enter(args)
    elif args.action == "replay":
        kept = json.loads(read_text(args.file))
        with TemporaryDirectory() as folder:  # an empty one: nothing is found, everything is computed
            fresh = entry(kept["cell"], _where(args), Store(f"{folder}/ranks", f"{folder}/records"), args.jobs)
        differences = compare(kept, fresh)
        print("\n".join(differences) or f"the same: {_gain(fresh)}")
        return 1 if differences else None
    else:
        write_page(args.folder)
    return None


def _enter(args: argparse.Namespace) -> None:
    if environment()["changed"]:
        raise AUSteerError("commit your changes first: a record names the commit that made it")
    flat, store = _flat(args), Store(args.path, str(Path(args.results) / "records"))
    entered = entry(flat, _where(args), store, args.jobs)
    refuse(entered, standing(args.folder))
    name = "-".join((_model_name(flat).rpartition("/")[2], *(flat[key] for key in ("task", "method", "site"))))
    change_of_first_draw(entered, _where(args), store).save(args.folder / f"{name}.safetensors")
    write_json(args.folder / f"{name}.json", entered)
    write_page(args.folder)
    print(f"{args.folder / name}.json: {_gain(entered)}")


def entry(flat: dict, where: dict, store: Store, jobs: int | None = None) -> dict:
    """Compute the draws and vanilla, or find them, and return what a record's file holds."""
    cells = cells_of(flat, where)
    executor = executor_for(jobs, None, where.get("device"), "live", tiny=flat["model"] == EMBEDDED)
    try:
        made = dict(run_cells([cells[0].unsteered(), *cells], store, executor))
    finally:
        executor.close()
    if failed := next((record["failed"] for record in made.values() if "failed" in record), None):
        raise AUSteerError(failed)
    records = [made[cells[0].unsteered()], *(made[cell] for cell in cells)]
    for record in records[1:]:
        kl = record["kl"].get("measured")
        if kl is None or abs(kl / LEVEL - 1) > TOLERATED:
            why = record["kl"].get("unreached") or f"it costs {kl}"
            raise AUSteerError(f"rule 1: a draw is not at {LEVEL:g} nats: {why}; nothing was written")
    rows = parts_report.measures(records)[-1]
    kept = {
        "cell": {key: flat[key] for key in CELL}, "vanilla": {key: rows[0][key] for key in KEPT if key in rows[0]},
        "draws": [{key: row[key] for key in KEPT if key in row} for row in rows[1:]],
    }  # fmt: skip
    return kept | _result(kept)


def cells_of(flat: dict, where: dict) -> list[Cell]:
    """Return the cells of a record, one per draw of the pairs. where: what does not decide the numbers, such as folders."""
    more = {"n_pairs": PAIRS, "search": AT_KL}
    draws = [draw * METHODS[flat["method"]].draws for draw in DRAWS]
    return [
        at_kl(cell_of(**flat, **where, **more, pairs_draw=n, draw=draw), LEVEL)
        for n, draw in zip(DRAWS, draws, strict=True)
    ]


def _result(kept: dict) -> dict:
    """Return the name, gain and p that follow from a record's outcomes."""
    (line,) = kl_report.lines_of(kept["draws"], LABELS)
    gain, p = kl_report.estimate(line, kept["vanilla"]), kl_report.p_of(line, kept["vanilla"])
    return {"name": line.name, "gain": list(gain), "p": p}


def change_of_first_draw(entered: dict, where: dict, store: Store) -> Change:
    """Return the plan or adapter of the first draw, learning it again if it was not kept."""
    cell = cells_of(entered["cell"], where)[0]
    run, method = RunAtKL(cell, BENCHES.open(cell.model, cell.task, store), "record"), method_of(cell.method)
    return run.at_level(method, run.learned(method)[0], entered["draws"][0]["settings"])[0]


def refuse(entered: dict, records: Sequence[dict]) -> None:
    """Say which rule a new entry fails."""
    if not (entered["gain"][0] > 0 and entered["p"] < MOST_P):
        raise AUSteerError(
            f"rule 3: {_gain(entered)} with p = {entered['p']:.1g} is no gain at p < {MOST_P:g}; nothing was written"
        )
    for record in records:
        if _place(record) == _place(entered) and record["gain"][0] >= entered["gain"][0]:
            raise AUSteerError(
                f"rule 4: {record['name']} stands at {_gain(record)}, and this is {_gain(entered)}; nothing was written"
            )


def compare(kept: dict, fresh: dict) -> list[str]:
    """Return what differs between a record and its replay by more than rule 5 allows."""
    differences = []
    names = ["vanilla", *(f"draw {number}" for number in DRAWS)]
    for name, before, after in zip(
        names, [kept["vanilla"], *kept["draws"]], [fresh["vanilla"], *fresh["draws"]], strict=True
    ):
        other = [key for key in ("n", "measure", "pairs_hash", "fingerprint") if before.get(key) != after.get(key)]
        if other:
            differences.append(f"{name}: another {', '.join(other)}")
            continue
        changed = sum(a != b for a, b in zip(unpack(before["outcomes"]), unpack(after["outcomes"]), strict=True))
        is_same_processor = before["environment"]["machine"] == after["environment"]["machine"]
        if changed > (0 if is_same_processor else MOST_DIFFERENT * before["n"]):
            differences.append(f"{name}: {changed} of {before['n']} outcomes differ")
    return differences


def standing(folder: Path) -> list[dict]:
    """Read the records of a folder; of each model and task, the one with the largest gain."""
    records = [json.loads(read_text(file)) for file in folder.glob("*.json")]
    records = [record | _result(record) for record in records]  # gains follow from outcomes, whatever a file says
    return [*{_place(record): record for record in sorted(records, key=lambda record: record["gain"][0])}.values()]


def write_page(folder: Path) -> None:
    """Write the page of a folder beside it."""
    write_text(folder.with_suffix(".md"), table(standing(folder)))


def table(records: Sequence[dict]) -> str:
    """Return the page of the records, in Markdown."""
    lines = [
        "# Records", "",
        f"Per model and task, the method with the largest gain at {LEVEL:g} nats. To beat one, run one command; it writes the files.", "",
        "    python main.py record enter --model M --data_name T --method NAME --applied_module SITE --data-dir DIR",
        "    python main.py record replay docs/records/FILE.json --data-dir DIR", "",
        RULES.format(level=LEVEL, pairs=PAIRS, p=MOST_P, different=MOST_DIFFERENT), "",
        "| model | task | unsteered, % | n | method | gain, points [95 %] | p | KL of the draws | commit |",
        "|---|---|--:|--:|---|--:|--:|---|---|",
    ]  # fmt: skip
    for record in sorted(records, key=_place):
        vanilla, draws = record["vanilla"], record["draws"]
        kls = [row["kl"]["measured"] for row in draws]
        cells = [
            *_place(record)[:2], f"{100 * vanilla['right'] / vanilla['n']:.1f}", str(vanilla["n"]),
            record["name"], _gain(record), f"{record['p']:.1g}", f"{min(kls):.4f} to {max(kls):.4f}",
            draws[0]["environment"]["commit"][:10],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nMade by `python main.py record table` from the files in `docs/records/`.\n"


def _place(record: dict) -> tuple[str, ...]:
    """Return what records compete on: model, task, test split and weights."""
    cell = record["cell"]
    return _model_name(cell), cell["task"], cell["test_split"], record["vanilla"]["fingerprint"]


def _model_name(cell: dict) -> str:
    return cell["model"] if cell["model"] == EMBEDDED else public_name(cell["model"])


def _gain(record: dict) -> str:
    value, low, high = record["gain"]
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _where(args: argparse.Namespace) -> dict:
    """Return the fields of cells that say where things are."""
    names = ("data_dir", "device", "weights", "quick_proof")
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}


def _flat(args: argparse.Namespace) -> dict:
    """Return the fields of cells that decide the numbers."""
    return {
        "model": args.model, "task": task_names(args)[0], "method": args.method, "site": args.applied_module,
        "dtype": "float32" if args.dtype == "auto" else args.dtype, "test_split": args.test_split,
    }  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser("main.py record", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="enter|replay|table")
    enter = actions.add_parser(
        "enter", parents=parents(), help="run the draws of a method, and write its files if it beats the table"
    )
    enter.add_argument(
        "--method", required=True, choices=METHODS, metavar="NAME", help="one of `main.py --list-methods`"
    )
    enter.add_argument(
        "--applied_module", required=True, metavar="SITE", help="site to steer, such as attention or attention+neuron"
    )
    enter.add_argument("--path", default="AU_ranks", metavar="PATH", help="folder of ranks (default: %(default)s)")
    replay = actions.add_parser("replay", help="compute a record's draws anew and compare")
    replay.add_argument("file", type=Path, help="a record file from docs/records/")
    replay.add_argument("--data-dir", help="folder of the task's dataset (default: datasets/, then the hub)")
    arguments.weights_option(replay)
    replay.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, else the CPU)")
    page = actions.add_parser("table", help="write docs/records.md from the files")
    for action in (enter, replay):
        action.add_argument(
            "--jobs", type=int, help="processes (default: for the embedded models one per core, at most 4; else 1)"
        )
    for action in (enter, page):
        action.add_argument("--folder", type=Path, default=FOLDER,
                            help="folder of the files; the page lies beside it (default: docs/records)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.action == "enter":
        _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuse what is no whole task of the project at five draws."""
    check(args, "jobs")
    unused = [
        f"--{name}" for name, given in (("pairs", args.pairs), ("limit", args.limit), ("chat", args.chat)) if given
    ]
    if unused:
        raise AUSteerError(f"a record covers a whole task of the project: leave out {', '.join(unused)}")
    if args.data_name == "all":
        raise AUSteerError("a record covers one task: choose it with --data_name")
    method = METHODS[args.method]
    if not method.scalable:
        raise AUSteerError(f"{args.method} has no strength that could bring it to {LEVEL:g} nats")
    if args.applied_module not in method.sites:
        raise AUSteerError(f"{args.method} acts at {', '.join(method.sites)}, not at {args.applied_module}")


if __name__ == "__main__":
    run_command(main)
