"""Options that several commands share, as parent parsers: named once, explained once."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from austeer.errors import AUSteerError
from austeer.pairs import FIELDS
from rmodels import SITES
from rmodels.causal_lm import KERNELS

QUICK_PROOF = "when loading, prove the gates of three layers instead of all: for huge models"


def parent(*parents: ArgumentParser) -> ArgumentParser:
    return ArgumentParser(add_help=False, parents=parents)


def parser(prog: str | None, description: str, **more) -> ArgumentParser:
    """Make a command's parser, whose help shows its texts as they are written."""
    return ArgumentParser(prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter, **more)


def model_options(required: bool = True, **more) -> ArgumentParser:
    """Offer what loads a model: which one, where, and in what precision. more: of --model, such as a default."""
    options = parent()
    add = options.add_argument
    add("--model", required=required, **{"help": "hub id, folder of a checkpoint, or GGUF file", **more})
    weights_option(options)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the checkpoint's)")
    add("--quick-proof", action="store_true", help=QUICK_PROOF)
    return options


def weights_option(options: ArgumentParser) -> None:
    options.add_argument("--weights", metavar="FOLDER", help="read the weights and the tokenizer from this folder or GGUF file; "
        "headers and records still call the model by the name of --model")  # fmt: skip


def attn_option() -> ArgumentParser:
    options = parent()
    options.add_argument("--attn", choices=KERNELS, help="attention kernel (default: upstream's choice; for Gemma-2 eager, "
        "since sdpa drops the soft cap that it was trained with)")  # fmt: skip
    return options


def loading_options() -> ArgumentParser:
    """Offer the other options of loading a model."""
    options = parent(attn_option())
    add = options.add_argument
    add("--quantization", choices=["4bit", "8bit"], help="load the weights through bitsandbytes")
    add("--device-map", help="spread one model over several GPUs: auto, balanced, ... (instead of --device)")
    add("--revision", help="revision of the checkpoint on the hub")
    return options


def pairs_options(required: bool = True) -> ArgumentParser:
    options = parent()
    add = options.add_argument
    add("--pairs", required=required, help="file of contrastive pairs (.jsonl or .csv)")
    add("--fields", nargs=3, default=list(FIELDS), metavar=("PROMPT", "RIGHT", "WRONG"),
        help="names of the three fields in the file of pairs")  # fmt: skip
    return options


def plan_options() -> ArgumentParser:
    """Offer the two ways to name a plan: its files, or the ranks that it is made from."""
    options = parent()
    add = options.add_argument
    add("--plan", nargs="+", metavar="FILE", help="plan files (`austeer plan`, or set_MFU.py); several add up")
    add("--ranks", help="instead of a plan: ranks file, or a folder of the authors' .pt files, with --k and --alpha")
    add("--site", choices=SITES, help="the site of the authors' .pt files, which do not name it")
    add("--k", type=int, help="how many AUs")
    add("--alpha", type=float, help="strength")
    return options


def check_plan_options(args: Namespace) -> None:
    """Refuse options that name no plan, or name it twice."""
    from_ranks = {"--k": args.k, "--alpha": args.alpha, "--site": args.site}
    if bool(args.plan) == bool(args.ranks):
        raise AUSteerError("give either --plan, or --ranks with --k and --alpha")
    if args.ranks and (args.k is None or args.alpha is None):
        raise AUSteerError("--ranks needs --k and --alpha")
    if args.plan and (beside := [name for name, value in from_ranks.items() if value is not None]):
        raise AUSteerError(f"--plan does not take {', '.join(beside)}")
