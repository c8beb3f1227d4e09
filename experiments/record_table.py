"""A table of records that others can beat: the largest gain in skill at 0.01 nats, per model and task (docs/records.md).

python main.py record enter --model M --data_name T --method fisher --applied_module attention+neuron --data-dir DIR
python main.py record replay docs/records/FILE.json --data-dir DIR
python main.py record table                                        writes docs/records.md from the files beside it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from austeer import arguments
from austeer.change import Change
from austeer.errors import AUSteerError, run_command
from austeer.files import read_text, write_json, write_text
from austeer.methods.registry import METHODS
from experiments import kl_report, parts_report
from experiments.arguments import check, parents, task_names
from experiments.bench import BENCHES
from experiments.cell import AT_KL, Cell, at_kl, cell_of
from experiments.records import unpack
from experiments.report import LABELS
from experiments.run_cell import RunAtKL, method_of, run_cell
from experiments.store import Store

FOLDER, PAGE = Path(__file__).parents[1] / "docs" / "records", "records.md"
LEVEL, DRAWS, PAIRS, MOST_P = 0.01, (0, 1, 2, 3, 4), 400, 0.01
SPREAD = 0.01  # share of the items that another processor's rounding may answer otherwise
KEPT = ("id", "method", "site", "options", "draw", "pairs_hash", "n", "right", "measure", "outcomes", "test_split", "touched", "kl",
        "settings", "code", "fingerprint", "device", "environment")  # fmt: skip
CELL = ("model", "task", "method", "site", "options", "dtype", "test_split")  # what a file says of its cells
RULES = """1. The gain is skill at {level:g} nats of KL per token of neutral text, measured within a tenth of that ([budget.md](budget.md)).
2. Five draws of {pairs} ranking pairs, by group, seeds 0 to 4. Nothing is chosen on test items.
3. p < {p:g}: of the mean outcome of each item over draws, and of the draws, whichever is larger.
4. A new record has a larger mean gain than the one that stands. A method that nobody can read is no record: its file is part of it.
5. `python main.py record enter ...` runs the draws, writes the file beside the others and this page, or says which rule fails.
   `python main.py record replay FILE` runs them anew: all is equal but times, commit and machine; on another processor at most
   {spread:.0%} of the items may differ."""


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _arguments(argv)
    store = Store(getattr(args, "path", "AU_ranks"), str(Path(getattr(args, "results", "results")) / "records"))
    if args.action == "enter":
        entered = entry(_flat(args), _where(args), store)
        refuse(entered, standing(args.folder))
        file = (
            args.folder
            / f"{entered['cell']['model'].rpartition('/')[2]}-{entered['cell']['task']}-{entered['cell']['method']}.json"
        )
        write_json(file, entered)
        change = change_of_first_draw(entered, _where(args), store)
        if change is not None:  # None: only the prompts differ
            change.save(file.with_suffix(".safetensors"))
        print(f"{file}: {_gain(entered)}")
    elif args.action == "replay":
        kept = json.loads(read_text(args.file))
        differences = compare(kept, entry(kept["cell"], _where(args), store))
        print("\n".join(differences) or f"the same: {_gain(kept)}")
        return 1 if differences else None
    write_text(args.folder.parent / PAGE, table(standing(args.folder)))
    return None


def cells_of(flat: dict, where: dict) -> list[Cell]:
    """Return the cells of a record, one per draw of the pairs. where: what does not decide the numbers, such as folders."""
    return [at_kl(cell_of(**flat, **where, n_pairs=PAIRS, pairs_draw=draw, search=AT_KL), LEVEL) for draw in DRAWS]


def entry(flat: dict, where: dict, store: Store) -> dict:
    """Run the draws and vanilla, or find them, and return what a record's file holds."""
    cells = cells_of(flat, where)
    made = [run_cell(cell, BENCHES.open(cell.model, cell.task, store)) for cell in (cells[0].unsteered(), *cells)]
    if short := next((row["kl"]["unreached"] for row in made[1:] if "unreached" in row["kl"]), None):
        raise AUSteerError(f"rule 1: a draw does not reach {LEVEL:g} nats: {short}")
    rows = parts_report.measures(made)[-1]
    (line,) = kl_report.lines_of(rows, LABELS)
    return {
        "cell": {key: flat[key] for key in CELL if key in flat}, "name": line.name,
        "gain": list(kl_report.estimate(line, rows[0])), "p": kl_report.p_of(line, rows[0]),
        "vanilla": {key: rows[0][key] for key in ("id", "n", "right", "measure", "outcomes", "test_split")},
        "draws": [{key: row[key] for key in KEPT if key in row} for row in rows[1:]],
    }  # fmt: skip


def refuse(entered: dict, records: Sequence[dict]) -> None:
    """Say which rule a new entry fails."""
    if not (entered["gain"][0] > 0 and entered["p"] < MOST_P):
        raise AUSteerError(f"rule 3: {_gain(entered)} is no significant gain (p < {MOST_P:g})")
    for record in records:
        if _place(record) == _place(entered) and record["gain"][0] >= entered["gain"][0]:
            raise AUSteerError(f"rule 4: {record['name']} stands at {_gain(record)}; this is {_gain(entered)}")


def compare(kept: dict, fresh: dict) -> list[str]:
    """Return what differs between a record and its replay by more than rounding on another processor explains."""
    differences = []
    for name, before, after in [("vanilla", kept["vanilla"], fresh["vanilla"]),
                                *((f"draw {n}", *both) for n, both in enumerate(zip(kept["draws"], fresh["draws"], strict=True)))]:  # fmt: skip
        if before["n"] != after["n"] or before["measure"] != after["measure"]:
            differences.append(f"{name}: other items or another measure")
            continue
        others = sum(a != b for a, b in zip(unpack(before["outcomes"]), unpack(after["outcomes"]), strict=True))
        if others > SPREAD * before["n"]:
            differences.append(f"{name}: {others} of {before['n']} outcomes differ")
    return differences


def standing(folder: Path) -> list[dict]:
    """Read the records of a folder, the latest of each place: the one with the largest gain."""
    records = sorted(
        (json.loads(read_text(file)) for file in folder.glob("*.json")), key=lambda record: record["gain"][0]
    )
    return [*{_place(record): record for record in records}.values()]


def table(records: Sequence[dict]) -> str:
    lines = [
        "# Records", "",
        f"Per model and task the method with the largest gain in skill at {LEVEL:g} nats. To beat one is one command and one file.", "",
        RULES.format(level=LEVEL, pairs=PAIRS, p=MOST_P, spread=SPREAD), "",
        "| model | task | unsteered, % | n | method | gain, points [95 %] | p | KL of the draws | by commit |",
        "|---|---|--:|--:|---|--:|--:|---|---|",
    ]  # fmt: skip
    for record in sorted(records, key=_place):
        vanilla, draws = record["vanilla"], record["draws"]
        kls = [row["kl"]["measured"] for row in draws]
        cells = [
            record["cell"]["model"], record["cell"]["task"], f"{100 * vanilla['right'] / vanilla['n']:.1f}", str(vanilla["n"]),
            record["name"], _gain(record), f"{record['p']:.1g}", f"{min(kls):.4f} to {max(kls):.4f}",
            draws[0]["environment"]["commit"][:10],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nMade by `python main.py record table` from the files in `docs/records/`.\n"


def _place(record: dict) -> tuple[str, str]:
    return record["cell"]["model"], record["cell"]["task"]


def _gain(record: dict) -> str:
    value, low, high = record["gain"]
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def change_of_first_draw(entered: dict, where: dict, store: Store) -> Change | None:
    """Return the plan or adapter of the first draw; this process has learned it for the record, and finds it at once."""
    cell = cells_of(entered["cell"], where)[0]
    run, method = RunAtKL(cell, BENCHES.open(cell.model, cell.task, store), "record"), method_of(cell.method)
    return run.at_level(method, run.learned(method)[0], entered["draws"][0]["settings"])[0]


def _where(args: argparse.Namespace) -> dict:
    return {
        key: getattr(args, key) for key in ("data_dir", "device", "weights", "quick_proof") if getattr(args, key, None)
    }


def _flat(args: argparse.Namespace) -> dict:
    return {
        "model": args.model, "task": task_names(args)[0], "method": args.method, "site": args.applied_module,
        "dtype": "float32" if args.dtype == "auto" else args.dtype, "test_split": args.test_split,
    }  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser("main.py record", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="enter|replay|table")
    enter = actions.add_parser(
        "enter", parents=parents(), help="run the draws of a method, and write its file if it beats the table"
    )
    enter.add_argument(
        "--method", required=True, choices=METHODS, metavar="NAME", help="one of `main.py --list-methods`"
    )
    enter.add_argument(
        "--applied_module", required=True, metavar="SITE", help="site to steer, such as attention or attention+neuron"
    )
    replay = actions.add_parser("replay", help="run a record's draws anew and compare")
    replay.add_argument("file", type=Path, help="file of docs/records/")
    replay.add_argument("--data-dir", help="folder of the task's dataset (default: datasets/, then the hub)")
    arguments.weights_option(replay)
    replay.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, else the CPU)")
    replay.add_argument("--results", default="results", help="folder for records (default: %(default)s)")
    for action in (enter, replay):
        action.add_argument("--path", default="AU_ranks", metavar="PATH", help="folder of ranks (default: %(default)s)")
    for action in (enter, replay, actions.add_parser("table", help="write docs/records.md")):
        action.add_argument(
            "--folder", type=Path, default=FOLDER, help="folder of the record files (default: docs/records)"
        )
    args = parser.parse_args(argv)
    if args.action == "enter":
        check(args)
        if args.data_name == "all" and not args.pairs:
            raise AUSteerError("a record is of one task: name it with --data_name")
        if args.applied_module not in METHODS[args.method].sites:
            raise AUSteerError(
                f"{args.method} acts at {', '.join(METHODS[args.method].sites)}, not at {args.applied_module}"
            )
    return args


if __name__ == "__main__":
    run_command(main)
