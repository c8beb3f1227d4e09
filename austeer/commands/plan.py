"""The command that makes a plan: `python set_MFU.py`, or `austeer plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import rmodels
from austeer import arguments
from austeer.budget import ESTIMATES, LIMIT, RIDGE, Z
from austeer.commands.loading import load_model
from austeer.errors import AUSteerError
from austeer.fisher import Fisher
from austeer.plan import TOKENS, Plan
from austeer.ranks import AUTHORS_FILES, AURanks, ranks_file
from set_MFU import LOCATIONS, STRENGTHS, set_MFU


def _arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    def table(choices: dict[str, str]) -> str:
        return "\n".join(f"  {name:<11} {text}" for name, text in choices.items())

    epilog = f"locations:\n{table(LOCATIONS)}\nstrengths:\n{table(STRENGTHS)}"
    measured = "with --kl: measure the plan on this model, and correct its strength (hub id, folder, or GGUF file)"
    parser = arguments.parser(
        prog, "Make a steering plan from ranks, print it, and save it: of k AUs at a strength alpha, or of a stated cost.",
        epilog=epilog, parents=[arguments.model_options(required=False, help=measured), arguments.loading_options()],
    )  # fmt: skip
    add = parser.add_argument
    add("--ranks", nargs="+", required=True, metavar="FILE", help="ranks file, or a folder of ranks files (with --site) or of "
        "the authors' .pt files; with --kl several, whose sites share the budget")  # fmt: skip
    add(
        "--site",
        nargs="+",
        choices=rmodels.SITES,
        help="which ranks of a folder; of the authors' .pt files, their site",
    )
    add("--k", type=int, help="how many AUs to steer (with --kl it is chosen unless given)")
    add("--alpha", type=float, help="strength")
    add("--location", default="score", choices=LOCATIONS, help="which AUs (default: %(default)s)")
    add("--strength", default="adaptive", choices=STRENGTHS, help="how strongly (default: %(default)s)")
    add("--tokens", default="all", choices=TOKENS, help="which positions (default: %(default)s)")
    add("--seed", type=int, default=0, help="for random locations and flipped signs")
    add("--out", help="save the plan here (.safetensors)")
    budget = parser.add_argument_group("a stated cost, for causal ranks").add_argument
    budget("--kl", type=float, metavar="NATS", help="what the plan may cost, in place of --alpha: KL of the unsteered to the "
           "steered model in nats per token of neutral text, such as 0.01")  # fmt: skip
    budget("--fisher", nargs="+", metavar="FILE", help="Fisher information of the same model: python main.py fisher")
    budget("--estimate", default="discriminant", choices=ESTIMATES, help="how noisy effects are made smaller (default: %(default)s)")  # fmt: skip
    budget("--z", type=float, default=Z, help="standard errors that --estimate bound takes off (default: %(default)s)")
    budget("--ridge", type=float, default=RIDGE, help="of --estimate discriminant (default: %(default)s)")
    budget("--limit", type=float, default=LIMIT, help="the largest gate; 1: an AU is at most doubled or silenced (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = _arguments(argv, prog)
    _check(args)
    ranks = [AURanks.load(file, site) for file, site in _files(args)]
    if args.kl is None and len(ranks) > 1:
        raise AUSteerError("ranks of several sites share a budget: give --kl and --fisher, or one ranks file")
    plan = _strong(ranks[0], args) if args.kl is None else _priced(ranks, args)
    if args.out:  # before printing, which fails if the reader hangs up: `| head`
        plan.save(args.out)
    print(plan)
    if args.kl is not None:
        print(f"\n{_cost(plan, args)}")
    if args.out:
        print(f"\nsaved to {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.kl is None:
        if args.k is None or args.alpha is None:
            raise AUSteerError("give --k and --alpha, or --kl and --fisher")
        if args.fisher or args.model:
            raise AUSteerError("--fisher and --model need --kl, the cost that the plan may have")
        return
    if not args.fisher or args.alpha is not None:
        raise AUSteerError("--kl needs --fisher (python main.py fisher makes it), and no --alpha")
    others = {"location": "score", "strength": "adaptive", "tokens": "all"}
    if beside := [f"--{name}" for name, default in others.items() if getattr(args, name) != default]:
        raise AUSteerError(f"--kl itself says which AUs and how strongly: leave out {', '.join(beside)}")


def _files(args: argparse.Namespace) -> list[tuple[Path, str | None]]:
    """Return the ranks to read, and the site of those that do not name it."""
    files = []
    for path in map(Path, args.ranks):
        if not path.is_dir():
            files.append((path, None))
        elif (path / AUTHORS_FILES[0]).exists():
            files += [(path, site) for site in args.site or [None]]
        elif args.site:
            files += [(ranks_file(path, site), None) for site in args.site]
        else:
            raise AUSteerError(f"{path} is a folder: name the sites whose ranks to read by --site")
    return files


def _strong(ranks: AURanks, args: argparse.Namespace) -> Plan:
    return set_MFU(
        ranks, args.k, args.alpha, location=args.location, strength=args.strength, tokens=args.tokens, seed=args.seed
    )


def _priced(ranks: list[AURanks], args: argparse.Namespace) -> Plan:
    """Make the plan that costs what --kl says; refuse a budget that gates within the limit cannot spend."""
    fisher = Fisher.pooled([Fisher.load(file) for file in args.fisher])
    model = None
    if args.model:
        model = load_model(args)
    options = {"estimate": args.estimate, "z": args.z, "ridge": args.ridge, "limit": args.limit}
    plan = set_MFU(ranks, args.k, kl=args.kl, fisher=fisher, model=model, **options)
    if "reached" in plan.header:
        more = "a larger --k, or a larger --limit" if args.k else "or a larger --limit"
        raise AUSteerError(f"{plan.header['reached']} nats per token; give a smaller --kl, {more}")
    return plan


def _cost(plan: Plan, args: argparse.Namespace) -> str:
    """Say what the plan was predicted to cost and to gain, and what it costs."""
    header = plan.header
    measured = "not measured: give --model"
    if header["measured_kl"] is not None:
        fresh, error = header["fresh_kl"]
        measured = f"measured {header['measured_kl']:.4g}, on other text {fresh:.4g} +- {error:.2g}"
    gain, low, high = header["predicted_gain"]
    return (
        f"KL per token of neutral text: {args.kl:g} allowed, predicted {header['predicted_kl']:.4g} +- "
        f"{header['predicted_error']:.2g}, {measured}\n"
        f"gain of the objective, predicted for pairs that a plan was not made from: {gain:+.4f} [{low:+.4f}, {high:+.4f}] nats\n"
        f"{header['k']} AUs: {header['clipped']} at the limit of {args.limit:g}, {header['massive']} of massive activations"
    )
