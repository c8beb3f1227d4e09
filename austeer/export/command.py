"""Export a plan into a checkpoint's weights or as an adapter, or undo a folded checkpoint.

    austeer export --model M --plan P --fold OUT
    austeer export --model M --ranks R --k 16 --alpha 2 --lora OUT      (or --ia3, --gguf)
    austeer export --unfold OUT --out BACK

In the checkout also `python main.py export ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from austeer import arguments
from austeer.errors import AUSteerError, missing_extra
from austeer.export.checkpoint import Checkpoint, stored_dtype
from austeer.files import check_new
from austeer.plan import Plan
from austeer.ranks import AURanks
from set_MFU import set_MFU

TARGETS = ("fold", "lora", "ia3", "gguf", "unfold")


def main(argv: Sequence[str] | None = None, prog: str = "main.py export") -> None:
    args = _arguments(argv, prog)
    if args.unfold:
        from austeer.export.fold import unfold

        unfold(args.unfold, args.out)
        print(f"{args.out}: the checkpoint as it was before folding, proved by the SHA-256 of its weight files")
        return
    plan = read_plan(args)
    if args.fold:
        _fold(args, plan)
    else:
        _adapt(args, plan)


def _adapt(args: argparse.Namespace, plan: Plan) -> None:
    checkpoint = Checkpoint(args.weights or args.model, stored_dtype(plan))
    checkpoint.check_plan(plan)
    if args.lora:
        from austeer.export.lora import save_lora

        print(save_lora(checkpoint, plan, args.lora))
    elif args.ia3:
        from austeer.export.ia3 import save_ia3

        print(f"{args.ia3}: IA3, {save_ia3(checkpoint, plan, args.ia3)} modules")
    else:
        from austeer.export.gguf_lora import save_gguf_lora

        save_gguf_lora(checkpoint, plan, args.gguf)
        print(f"{args.gguf}: load it with llama.cpp's --lora; a request's scale multiplies the plan's strength")


def read_plan(args: argparse.Namespace) -> Plan:
    """Return what the arguments of `arguments.plan_options` name: the sum of the plans, or a new one from ranks."""
    if not args.plan:
        return set_MFU(AURanks.load(args.ranks, args.site), args.k, args.alpha)
    first, *others = [Plan.load(path) for path in args.plan]
    shared: set[tuple] = set()
    for other in others:
        shared |= {au[:3] for au in first.conflicts(other)}
        first = first + other
    if shared:
        print(f"note: {len(shared)} AUs are in several plans; their scales add")
    return first


def _fold(args: argparse.Namespace, plan: Plan) -> None:
    from austeer.export.fold import CERTIFICATE, UNDO, fold

    original = args.weights or args.model
    parity = fold(original, plan, args.fold, certificate=not args.no_certificate, quick_proof=args.quick_proof)
    print(f"{args.fold}: {args.model} with {len(plan)} AUs in its weights; {UNDO} undoes it")
    if parity is None:
        print("not compared with live steering (--no-certificate)")
        return
    algebra, rounding = parity["algebra"], parity["rounding"]
    print(
        f"parity with live steering at {parity['positions']} positions: logits differ by "
        f"{algebra['max_logit_difference']:.2g} (allowed {algebra['allowed']:.2g}), and every tensor is the steered one "
        f"in {parity['weights']}, whose rounding moves logits by {rounding['max_logit_difference']:.2g} (the plan by "
        f"{parity['steering_moves_logits_by']:.2g}); greedy tokens agree on {rounding['greedy_agreement']:.1%}; "
        f"{CERTIFICATE}"
    )
    if unchanged := sum(map(len, parity["unchanged_by_rounding"].values())):
        print(f"note: rounding leaves {unchanged} rows and columns as they were; the certificate names them")
    if parity["steering_moves_logits_by"] <= algebra["allowed"]:
        print("note: the plan moves these prompts' logits by less than the tolerance, so this proves little")


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = arguments.parser(prog, __doc__, parents=[arguments.plan_options()])
    add = parser.add_argument
    add("--model", help="checkpoint folder, hub id, or GGUF file")
    arguments.weights_option(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--fold", metavar="OUT", help="write a checkpoint with the plan in its weights")
    target.add_argument("--lora", metavar="OUT", help="write a PEFT LoRA adapter")
    target.add_argument("--ia3", metavar="OUT", help="write a PEFT IA3 adapter")
    target.add_argument("--gguf", metavar="OUT", help="write a LoRA adapter for llama.cpp, its scale the strength")
    target.add_argument("--unfold", metavar="FOLDED", help="undo a folded checkpoint, into --out")
    add("--out", help="for --unfold: where the checkpoint goes")
    add("--no-certificate", action="store_true", help="fold without loading the model to prove parity")
    add("--quick-proof", action="store_true", help=arguments.QUICK_PROOF)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuse missing options, and options that would be ignored, with a line that names them."""
    options = {name for name, value in vars(args).items() if value is not None and value is not False}
    target = next(name for name in TARGETS if name in options)
    for name in options & {*TARGETS, "out", "model", "ranks", "weights"}:
        if not getattr(args, name):
            raise AUSteerError(f"--{name} is empty: give it a name")
    if target == "unfold":
        needed, source = {"out"}, set()
    elif "plan" in options or "ranks" not in options:
        needed, source = {"model", "plan"}, {"plan"}
    else:
        needed, source = {"model", "ranks", "k", "alpha"}, {"site"}
    missing = [f"--{name}" for name in ("model", "plan", "ranks", "k", "alpha", "out") if name in needed - options]
    if missing:
        instead = ", or --ranks with --k and --alpha" if "--plan" in missing else ""
        raise AUSteerError(f"--{target} needs {' and '.join(missing)}{instead}")
    extra = {"no_certificate", "quick_proof"} if target == "fold" else set()
    extra |= {"weights"} if target != "unfold" else set()
    superfluous = sorted(f"--{name.replace('_', '-')}" for name in options - {target} - needed - source - extra)
    if superfluous:
        form = f"--{target}" + (" with --plan" if "plan" in needed else "")
        raise AUSteerError(f"{form} does not take {', '.join(superfluous)}")
    if "site" in options and not Path(args.ranks).is_dir():
        raise AUSteerError(f"{args.ranks} names its site itself: leave out --site, which is for the authors' .pt files")
    if target == "gguf" and find_spec("gguf") is None:  # now, and not after a large checkpoint is read
        raise missing_extra("gguf", "export")
    check_new(args.out if target == "unfold" else getattr(args, target))
