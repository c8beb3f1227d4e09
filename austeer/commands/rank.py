"""The command that ranks: `python MFU_screening.py`, or `austeer rank`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import rmodels
from austeer import arguments, processes
from austeer.commands.loading import load_model
from austeer.errors import AUSteerError
from austeer.files import check_writable
from austeer.identity import fingerprint, public_name
from austeer.pairs import pairs_hash, read_columns, read_pairs
from austeer.ranks import AURanks, ranks_file
from austeer.temperature import FITTED
from austeer.tokens import PROTOCOLS, longest_text
from MFU_screening import TEMPERED, momentum_name, screen


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = _arguments(argv, prog)
    if len(args.site) > 1 and args.out.endswith(".safetensors"):
        raise AUSteerError("--out must be a folder when several sites are ranked")
    rules, files = PROTOCOLS[args.protocol], {site: ranks_file(args.out, site) for site in args.site}
    pairs = read_pairs(args.pairs, args.fields, check=rules.first_pairs is None)[: rules.first_pairs]
    groups = (
        [name for (name,) in read_columns(args.pairs, [args.group_field])][: len(pairs)] if args.group_field else None
    )
    for file in files.values():
        check_writable(file)
    model = load_model(args, processes.join(args.device, spread=args.device_map is not None))
    tokenizer = rmodels.load_tokenizer(args.model, revision=args.revision, weights=args.weights)
    momentum = momentum_name(args.momentum, args.temperature, args.balance)
    limit = longest_text(rules, rmodels.context_length(model), args.max_length, args.batch_size)
    wanted_header = {
        "fingerprint": fingerprint(model), "kernel": model.config._attn_implementation,
        "pairs_hash": pairs_hash(pairs), "protocol": args.protocol,
        "momentum": momentum, "balanced": args.balance, "tokenizer": public_name(tokenizer.name_or_path), "max_length": limit,
    }  # fmt: skip
    if momentum == TEMPERED:
        wanted_header["temperature"] = args.temperature
    is_missing = processes.flags_of_main([args.force or _is_missing(file, wanted_header) for file in files.values()])
    sites = [site for site, missing in zip(files, is_missing, strict=True) if missing]
    started = time.monotonic()
    ranks = screen(
        pairs, model, tokenizer, sites, protocol=args.protocol,
        momentum=momentum, temperature=args.temperature, balance=args.balance, groups=groups,
        batch_size=args.batch_size, max_length=args.max_length,
    ) if sites else {}  # fmt: skip
    seconds = time.monotonic() - started
    if not processes.is_main():
        return
    for site in sites:
        ranks[site].save(files[site])
        print(f"{files[site]}: {ranks[site].summary(seconds)}")
    for site in args.site if args.authors_files else ():
        AURanks.load(files[site]).save_authors(Path(args.authors_files) / site)


def _is_missing(file: Path, wanted_header: dict) -> bool:
    if not file.exists():
        return True
    header = {
        "kernel": wanted_header["kernel"],
        "balanced": False,
        **AURanks.load(file).header,
    }  # earlier files do not name theirs
    differs = ", ".join(key for key, value in wanted_header.items() if header.get(key) != value)
    if differs:
        raise AUSteerError(f"{file} exists and differs in {differs}; choose another --out, or --force to replace it")
    print(f"{file}: already there, same model, pairs and protocol")
    return False


def _arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Rank every atomic unit of a model by its momentum over contrastive pairs.",
        epilog="Pairs are JSON Lines of {prompt, positive, negative}, or CSV with those columns. "
        "For several GPUs: accelerate launch MFU_screening.py ..., or accelerate launch -m austeer rank ...",
        parents=[arguments.model_options(), arguments.loading_options(), arguments.pairs_options()],
    )
    add = parser.add_argument
    add("--site", nargs="+", default=["ffn"], choices=rmodels.SITES, help="which activations (default: ffn)")
    add("--out", required=True, help="ranks file (.safetensors), or a folder that gets <site>.safetensors")
    add("--momentum", default="activation", choices=["activation", "causal"],
        help="the paper's, or ours (default: %(default)s)")  # fmt: skip
    add("--temperature", type=_temperature, default=FITTED, metavar="fitted|TAU",
        help="of the causal objective, in nats of log-odds: fitted to the pairs, or a number (default: %(default)s)")  # fmt: skip
    add("--balance", action="store_true", help="keep only AUs that help for every right answer, which excludes those that merely "
        "favour one answer (causal momentum, pairs with a few shared answers)")  # fmt: skip
    add("--group-field", metavar="FIELD", help="field of the pairs that names their group: pairs of one group give each other "
        "away, and stay in one fold of what a plan's gain is predicted from (default: pairs of one prompt)")  # fmt: skip
    add("--protocol", default="clean", choices=PROTOCOLS, help="clean, or the authors' code (default: %(default)s)")
    add("--batch-size", type=int, help="pairs at once; halved automatically when memory runs out")
    add("--max-length", type=int, help="longest text in tokens; a longer prompt loses its start")
    add("--authors-files", metavar="FOLDER", help="also write the authors' three .pt files")
    add("--force", action="store_true", help="replace ranks that were made for other pairs, models or options")
    return parser.parse_args(argv)


def _temperature(text: str) -> str | float:
    return text if text == FITTED else float(text)
