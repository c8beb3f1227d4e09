"""Print the record behind a number of the report, and compute the number again.

python main.py trace table1 causal-head copa                 at the embedded scale
python main.py trace table1 iti boolq --scale paper --block llama2-7b-chat
python main.py trace table1 causal-head copa --again         computes it anew and compares, bit for bit
python main.py trace figure11 "causal momentum"              a panel of a measured figure
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from austeer.errors import AUSteerError, run_command
from experiments import run_cell
from experiments.cell import Cell
from experiments.store import Store
from paper import panels, specs
from paper.manifest import Manifest
from paper.specs import Panel, Spec

RESULT = ("n", "right", "measure", "outcomes", "columns", "measures", "extras", "settings", "grid_scores", "touched", "inverted", "foretold",
          "found")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _arguments(argv)
    manifest = Manifest.read(Path(args.results) / args.scale)
    matches = specs.read(
        args.scale, [args.table], **manifest.how, data_dir=args.data_dir, device=args.device, weights=args.weights
    )
    if not matches:
        raise AUSteerError(f"{args.table} is not in scale {args.scale}")
    (spec,) = matches
    jobs, records = _panel(spec, manifest, args) if spec.panels else _entry(spec, manifest, args)
    if args.again and any(panel.study == "overhead" for panel in spec.panels):
        raise AUSteerError(f"{args.table} holds times, which are never the same twice: drop --again")
    n_different = 0
    for job, record in zip(jobs, records, strict=True):
        output = {key: value for key, value in record.items() if args.whole or len(json.dumps(value)) < 400}
        print(json.dumps(output, indent=1))
        omitted = [key for key in record if key not in output]
        print(f"left out because they are long: {', '.join(omitted)} (--whole prints them)" if omitted else "")
        if args.again:
            n_different += not _is_reproduced(job, record)
    names = ("block", "data_dir", "device")
    options = "".join(
        f" --{name.replace('_', '-')} {json.dumps(vars(args)[name])}" for name in names if vars(args)[name]
    )
    options += f" --weights {' '.join(map(shlex.quote, args.weights))}" if args.weights else ""
    print(
        f"again: python main.py trace {args.table} {json.dumps(args.row)} {args.column or ''}{options} "
        f"--scale {args.scale} --results {args.results} --again"
    )
    return 1 if n_different else None


def _entry(spec: Spec, manifest: Manifest, args: argparse.Namespace) -> tuple[Sequence[Cell], list[dict]]:
    if not spec.entries:
        raise AUSteerError(f"{args.table} has no cells of its own" + (f": trace {spec.source}" if spec.source else ""))
    if args.column in spec.averages:
        parts = ", ".join(spec.averages[args.column])
        raise AUSteerError(f"{args.column} is an average of the columns {parts}: trace these one by one")
    block = args.block or next(iter(spec.blocks))
    entry = next((e for e in spec.entries if (e.block, e.row, e.column) == (block, args.row, args.column)), None)
    if entry is None:
        raise AUSteerError(
            f"no such number: {args.table} has blocks {', '.join(spec.blocks)}; rows {', '.join(spec.rows)}; columns "
            f"{', '.join(spec.columns)}"
        )
    records = manifest.records(spec.name, block, args.row, args.column)
    if not records:
        raise AUSteerError(f"not computed: {manifest.why_missing(spec.name, block, args.row, args.column)}")
    if len(records) < len(entry.cells):
        raise AUSteerError("some records of this number are missing from the folder: run reproduce.sh again")
    return entry.cells, records


def _panel(spec: Spec, manifest: Manifest, args: argparse.Namespace) -> tuple[Sequence[Panel], list[dict]]:
    panel = spec.panels_by_name.get(args.row)
    if panel is None or args.column:
        raise AUSteerError(
            f"{args.table} has no rows and columns, but panels: give one of {', '.join(map(repr, spec.panels_by_name))}"
        )
    record = manifest.panel(spec.name, panel.name)
    if record is None:
        raise AUSteerError(f"not computed: {manifest.why_missing(spec.name, panel.name, 'panel', panel.name)}")
    return [panel], [record]


def _is_reproduced(job: Cell | Panel, record: dict) -> bool:
    """Compute a record anew in an empty folder, ranks included, and say whether it is the same."""
    with TemporaryDirectory() as folder:
        store = Store(ranks=f"{folder}/AU_ranks", records=f"{folder}/records")
        fresh = (panels.attempt if isinstance(job, Panel) else run_cell.attempt)(job, store)
    if "failed" in fresh:
        raise AUSteerError(f"it could not be computed again: {fresh['failed']}")
    fresh = json.loads(json.dumps(fresh))
    differing = [key for key in RESULT if fresh.get(key) != record.get(key)]
    code = "the same code" if fresh["id"] == record["id"] else "other code or data than the record's"
    print(
        f"computed again, with {code}: " + (f"DIFFERS in {', '.join(differing)}" if differing else "equal, bit for bit")
    )
    return not differing


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", help=f"one of {', '.join(specs.names())}")
    add("row", help="a row of the table, or the panel of a figure")
    add("column", nargs="?", help="a column of the table")
    add("--block", help="the model or part of the table (default: the first)")
    add("--scale", default="embedded", choices=specs.SCALES, help="scale of the run (default: %(default)s)")
    add("--results", default="results", help="folder of results (default: %(default)s)")
    add("--data-dir", help="folder of the paper's datasets")
    add("--device", help="cpu, cuda, ...")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="MODEL=FOLDER",
        help="where the weights of a model are, as for reproduce.sh",
    )
    add("--whole", action="store_true", help="print long values, too")
    add("--again", action="store_true", help="compute the number anew and compare, bit for bit")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
