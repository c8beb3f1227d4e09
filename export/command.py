"""Export: a plan into a checkpoint's weights, or as an adapter; and a folded checkpoint back.

python main.py export --model M --plan P --fold OUT
python main.py export --model M --ranks R --k 16 --alpha 2 --lora OUT      (or --ia3, --gguf)
python main.py export --unfold OUT --out BACK
"""

from __future__ import annotations

import argparse
import functools
import operator
from collections.abc import Sequence

from errors import AUSteerError
from export.checkpoint import Checkpoint, local_folder
from plan import Plan
from ranks import AURanks
from rmodels import SITES
from set_MFU import set_MFU


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if args.unfold:
        from export.fold import unfold

        unfold(args.unfold, args.out)
        print(f"{args.out}: the checkpoint as it was before it was folded, proved by the SHA-256 of its weight files")
        return
    plan = functools.reduce(operator.add, _plans(args))
    if args.fold:
        _fold(args, plan)
    else:
        _adapt(args, plan)


def _adapt(args: argparse.Namespace, plan: Plan) -> None:
    Checkpoint(local_folder(args.model)).check_plan(plan)
    if args.lora:
        from export.lora import save_lora

        print(save_lora(args.model, plan, args.lora))
    elif args.ia3:
        from export.ia3 import save_ia3

        print(f"{args.ia3}: IA3, {save_ia3(args.model, plan, args.ia3)} modules")
    else:
        from export.gguf_lora import save_gguf_lora

        save_gguf_lora(args.model, plan, args.gguf)
        print(f"{args.gguf}: llama.cpp's --lora; the scale of a request is how strongly the plan acts, 1 as it is")


def _plans(args: argparse.Namespace) -> list[Plan]:
    if args.plan:
        return [Plan.load(path) for path in args.plan]
    return [set_MFU(AURanks.load(args.ranks, args.site), args.k, args.alpha)]


def _fold(args: argparse.Namespace, plan: Plan) -> None:
    from export.fold import CERTIFICATE, UNDO, fold

    parity = fold(args.model, plan, args.fold, certificate=not args.no_certificate)
    print(f"{args.fold}: {args.model} with {len(plan)} AUs in its weights; {UNDO} undoes it")
    if parity is None:
        print("not compared with live steering (--no-certificate)")
        return
    algebra, rounding = parity["algebra"], parity["rounding"]
    print(
        f"parity with live steering at {parity['positions']} positions: logits differ by {algebra['max_logit_difference']:.2g} "
        f"(allowed {algebra['allowed']:.2g}), and every tensor is the steered one in {parity['weights']}, whose rounding moves "
        f"logits by {rounding['max_logit_difference']:.2g} (the plan by {parity['steering_moves_logits_by']:.2g}); greedy "
        f"tokens agree on {rounding['greedy_agreement']:.1%}; {CERTIFICATE}"
    )
    if unchanged := sum(map(len, parity["unchanged_by_rounding"].values())):
        print(f"note: {unchanged} rows and columns are what they were, rounded; the certificate names them")
    if parity["steering_moves_logits_by"] <= algebra["allowed"]:
        print("note: the plan moves these prompts' logits by less than what is allowed, so this proves little")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="checkpoint folder, or hub id")
    add("--plan", nargs="+", help="plan files (set_MFU.py --out); several add up")
    add("--ranks", help="instead of a plan: ranks file, or a folder of the authors' .pt files, with --k and --alpha")
    add("--site", choices=SITES, help="the site of the authors' .pt files, which do not say")
    add("--k", type=int, help="how many AUs")
    add("--alpha", type=float, help="strength")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--fold", metavar="OUT", help="write a checkpoint with the plan in its weights")
    to.add_argument("--lora", metavar="OUT", help="write a PEFT LoRA adapter")
    to.add_argument("--ia3", metavar="OUT", help="write a PEFT IA3 adapter")
    to.add_argument("--gguf", metavar="OUT", help="write a LoRA adapter for llama.cpp, its scale the strength")
    to.add_argument("--unfold", metavar="FOLDED", help="undo a folded checkpoint, into --out")
    add("--out", help="for --unfold: where the checkpoint goes")
    add("--no-certificate", action="store_true", help="fold without loading the model to prove parity")
    args = parser.parse_args(argv)
    if args.unfold:
        if not args.out:
            raise AUSteerError("say where the checkpoint goes: --out BACK")
    elif not args.model:
        raise AUSteerError("name the model: --model, a checkpoint folder or hub id")
    elif bool(args.plan) == bool(args.ranks):
        raise AUSteerError("give either --plan, or --ranks with --k and --alpha")
    elif args.ranks and (args.k is None or args.alpha is None):
        raise AUSteerError("--ranks needs --k and --alpha")
    return args
