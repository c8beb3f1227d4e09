"""Options that several commands share, as parent parsers: named once, explained once."""

from __future__ import annotations

from argparse import ArgumentParser

from austeer.pairs import FIELDS


def parent() -> ArgumentParser:
    return ArgumentParser(add_help=False)


def model_options(required: bool = True, **more) -> ArgumentParser:
    """Offer what loads a model: which one, where, and in what precision. more: of --model, such as a default."""
    options = parent()
    add = options.add_argument
    add("--model", required=required, **{"help": "hub id, or folder of a checkpoint", **more})
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the checkpoint's)")
    return options


def loading_options() -> ArgumentParser:
    """Offer what else can be said of loading."""
    options = parent()
    add = options.add_argument
    add("--quantization", choices=["4bit", "8bit"], help="load the weights through bitsandbytes")
    add("--device-map", help="spread one model over several GPUs: auto, balanced, ... (instead of --device)")
    add("--attn", help="attention kernel: sdpa, eager, flash_attention_2, flash_attention_3")
    add("--revision", help="revision of the checkpoint on the hub")
    return options


def pairs_options(required: bool = True) -> ArgumentParser:
    options = parent()
    add = options.add_argument
    add("--pairs", required=required, help="file of contrastive pairs (.jsonl or .csv)")
    add("--fields", nargs=3, default=list(FIELDS), metavar=("PROMPT", "RIGHT", "WRONG"),
        help="names of the three fields in the file of pairs")  # fmt: skip
    return options
