"""The command that measures what steering costs: `python main.py fisher`, or `austeer fisher`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import rmodels
from austeer import arguments, processes
from austeer.commands.loading import load_model
from austeer.errors import AUSteerError
from austeer.files import check_writable
from austeer.fisher import Fisher, measure_fisher
from austeer.identity import model_header
from austeer.neutral import neutral_text


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = _arguments(argv, prog)
    out, sites = Path(args.out), list(dict.fromkeys(args.site))
    if out.suffix != ".safetensors":
        raise AUSteerError(f"--out must be a file that ends in .safetensors, not {out}")
    check_writable(out)
    model = load_model(args, processes.join(args.device, spread=args.device_map is not None))
    tokenizer = rmodels.load_tokenizer(args.model, revision=args.revision, weights=args.weights)
    neutral = neutral_text(tokenizer, args.neutral)
    header = model_header(model)
    wanted = {key: header[key] for key in ("fingerprint", "precision")} | {"neutral_hash": neutral.hash}
    known = None if args.force or not out.exists() else _known(out, wanted)
    is_missing = processes.flags_of_main([known is None or site not in known.sites for site in sites])
    missing = [site for site, is_missing in zip(sites, is_missing, strict=True) if is_missing]
    measured = [measure_fisher(model, missing, neutral)] if missing else []
    if not processes.is_main():
        return
    fisher = Fisher.pooled([*([known] if known else []), *measured])
    if missing:
        fisher.save(out)
    print(f"{out}: {_summary(fisher)}" + ("" if missing else "\n  it was there already"))


def _known(file: Path, wanted: dict) -> Fisher:
    fisher = Fisher.load(file)
    differs = ", ".join(key for key, value in wanted.items() if fisher.header.get(key) != value)
    if differs:
        raise AUSteerError(f"{file} exists and differs in {differs}; choose another --out, or --force to replace it")
    return fisher


def _summary(fisher: Fisher) -> str:
    header = fisher.header
    at = ", ".join(f"{site} ({layers} x {width})" for site, (layers, width) in _shapes(fisher).items())
    errors = ", ".join(f"{site} {100 * error:.1f} %" for site, error in header["relative_error"].items())
    return (
        f"{at} of {header['model']}, on {header['neutral']}: {header['tokens']} tokens to choose AUs by, "
        f"{header['pricing_tokens']} to price plans by\n  standard error of a site's sum: {errors}"
    )


def _shapes(fisher: Fisher) -> dict[str, tuple[int, int]]:
    return {site: tuple(values.shape) for site, values in fisher.diagonal.items()}


def _arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = arguments.parser(
        prog or "main.py fisher",
        "Measure the Fisher information of a model's gates on neutral text: what steering each AU costs.\n"
        "It is measured once per model and text, and serves every plan of a stated cost: set_MFU.py --kl.",
        epilog="A site that the file has already is not measured again.",
        parents=[arguments.model_options(), arguments.loading_options()],
    )
    add = parser.add_argument
    add("--site", nargs="+", default=["ffn"], choices=rmodels.SITES, help="where gates are (default: ffn)")
    add("--out", required=True, metavar="FILE", help="the file to write (.safetensors)")
    add("--neutral", metavar="FILE", help="neutral text (default: the prose that comes with the project)")
    add("--force", action="store_true", help="replace a file that was made for another model or text")
    return parser.parse_args(argv)
