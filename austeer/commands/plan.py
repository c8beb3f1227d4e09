"""The command that makes a plan: `python set_MFU.py`, or `austeer plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from austeer import arguments
from austeer.plan import TOKENS
from austeer.ranks import AURanks
from rmodels import SITES
from set_MFU import LOCATIONS, STRENGTHS, set_MFU


def _arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    def table(choices: dict[str, str]) -> str:
        return "\n".join(f"  {name:<11} {text}" for name, text in choices.items())

    epilog = f"locations:\n{table(LOCATIONS)}\nstrengths:\n{table(STRENGTHS)}"
    parser = arguments.parser(prog, "Make a steering plan from ranks, print it, and save it.", epilog=epilog)
    add = parser.add_argument
    add("--ranks", required=True, help="ranks file, or a folder of the authors' .pt files")
    add("--site", choices=SITES, help="the site of the authors' .pt files, which do not name it")
    add("--k", type=int, required=True, help="how many AUs to steer")
    add("--alpha", type=float, required=True, help="strength")
    add("--location", default="score", choices=LOCATIONS, help="which AUs (default: %(default)s)")
    add("--strength", default="adaptive", choices=STRENGTHS, help="how strongly (default: %(default)s)")
    add("--tokens", default="all", choices=TOKENS, help="which positions (default: %(default)s)")
    add("--seed", type=int, default=0, help="for random locations and flipped signs")
    add("--out", help="save the plan here (.safetensors)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = _arguments(argv, prog)
    plan = set_MFU(
        AURanks.load(args.ranks, args.site), args.k, args.alpha,
        location=args.location, strength=args.strength, tokens=args.tokens, seed=args.seed,
    )  # fmt: skip
    if args.out:  # before printing, which fails if the reader hangs up: `| head`
        plan.save(args.out)
    print(plan)
    if args.out:
        print(f"\nsaved to {args.out}")
