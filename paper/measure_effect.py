"""Ask of your model whether the score of an AU predicts what steering that AU does (the figure "effect" of the report).

python main.py effect --model M --pairs mine.jsonl

Half of the pairs rank the AUs; some AUs are then steered one by one, and measured on pairs held out from ranking.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError, run_command
from experiments.bench import BENCHES
from experiments.cell import bench_of
from experiments.ranking import make_ranks
from experiments.store import Store
from paper import panels
from paper.specs import Panel
from paper.studies import effect
from paper.studies.ranks import MOMENTA


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    model, task = bench_of(
        model=args.model, weights=args.weights, device=args.device, dtype=args.dtype, quick_proof=args.quick_proof,
        task=args.pairs, fields=tuple(args.fields),
    )  # fmt: skip
    folder = Path(args.results)
    store = Store(ranks=str(folder / "AU_ranks"), records=str(folder / "records"))
    bench = BENCHES.open(model, task, store)
    for momentum in MOMENTA:
        make_ranks(bench, momentum, args.site)
    for site in args.site:
        params = {"site": site, **{name: getattr(args, name) for name in ("strengths", "top", "random", "n", "seed")}}
        record = panels.measured(Panel(site, "effect", model, task, params), store, progress=True)
        path = folder / f"effect-{Path(args.model).name}-{task.label}-{site}.png"
        effect.draw(record["found"], params, path, None)
        print("\n".join(_lines(record["found"])))
        print(f"picture: {path}   record: {Path(store.records) / record['id']}.json")


def _lines(result: dict) -> list[str]:
    """List for each strength and measure how well each score predicts it."""
    lines = [
        f"{result['site']}: {len(result['dims'])} of {result['aus_of_site']} AUs, {result['pairs']} held-out pairs"
    ]
    for g, by_measure in result["agreement"].items():
        for measure, found in by_measure.items():
            lines.append(f"  change of {measure}, g = {g} (two halves of the pairs agree: ρ {found['halves'][0]:+.2f})")
            lines += [
                f"    {label:<24} {'   '.join(effect.facts(result, g, measure, score))}"
                for score, label in effect.SCORES.items()
            ]
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parents = [arguments.model_options(), arguments.pairs_options()]
    parser = arguments.parser("main.py effect", __doc__, parents=parents)
    add = parser.add_argument
    add("--site", nargs="+", default=["attention", "ffn"], choices=rmodels.SITES,
        help="sites of the AUs (default: attention ffn)")  # fmt: skip
    add("--strengths", nargs="+", type=float, default=[1.0, 8.0], metavar="G",
        help="an AU becomes x (1 + G), then x (1 - G); the picture shows the first (default: 1 8)")  # fmt: skip
    add("--top", type=int, default=16, help="AUs that are the best by each score (default: %(default)s)")
    add("--random", type=int, default=96, help="AUs drawn at random (default: %(default)s)")
    add("--n", type=int, default=64, help="at most this many held-out pairs (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the random draw (default: %(default)s)")
    add("--results", default="results", help="folder for ranks, records and pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("top", "random", "n"):
        if getattr(args, name) < 2:
            raise AUSteerError(f"--{name} must be at least 2, not {getattr(args, name)}")
    if args.seed < 0:
        raise AUSteerError(f"--seed must be at least 0, not {args.seed}")
    if not all(math.isfinite(g) and g > 0 for g in args.strengths):
        raise AUSteerError("--strengths must be positive numbers: both signs of each are measured")
    args.strengths = list(dict.fromkeys(args.strengths))
    rmodels.check_device(args.device)
    return args


if __name__ == "__main__":
    run_command(main)
