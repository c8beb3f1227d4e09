"""Screening: rank every atomic unit of a model by its momentum over contrastive pairs.

    python MFU_screening.py --model M --pairs pairs.jsonl --site ffn --out AU_ranks/M/task/ffn.safetensors
    accelerate launch MFU_screening.py ...            # the same ranks from several GPUs or nodes

Paper, section 4.1, and, with --momentum causal, docs/sign.md. What is computed per pair is in
austeer/momentum.py, how a pair becomes tokens in austeer/tokens.py. MFU is the authors' older word for AU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer import processes as shared_work
from austeer.errors import AUSteerError, run_command
from austeer.momentum import MOMENTA, Momentum
from austeer.pairs import Pair, check_pairs, pairs_hash, read_pairs
from austeer.ranks import AURanks, check_writable, fingerprint, model_header, public_name
from austeer.tokens import PROTOCOLS, EncodedPair, Protocol, encode

# How many tokens run at once, both texts of a pair counted. On a CPU, one prompt of ordinary length at a time keeps
# memory small; --batch-size 8 is a fifth faster and takes several times the memory (benchmarks/core.py).
BATCH_TOKENS = {"cpu": 160, "cuda": 8192}


def MFU_screening(
    train_dataset: Sequence[Sequence[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    applied_module: str = "ffn",
    *,
    protocol: str = "clean",
    momentum: str = "activation",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> AURanks:
    """Rank the AUs of one site. `train_dataset` holds [prompt, right, wrong]; saved to `path` if given.

    protocol: "clean", or "paper" for the authors' code, quirk by quirk (docs/fidelity.md).
    momentum: "activation" (the paper's) or "causal" (ours). max_length: default, the model's context.
    """
    ranks = screen(
        train_dataset, model, tokenizer, [applied_module],
        protocol=protocol, momentum=momentum, batch_size=batch_size, max_length=max_length, progress=progress,
    )[applied_module]  # fmt: skip
    if path is not None and PartialState().is_main_process:
        ranks.save(ranks_file(path, applied_module))
    return ranks


def screen(
    train_dataset: Sequence[Sequence[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[str],
    *,
    protocol: str = "clean",
    momentum: str = "activation",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> dict[str, AURanks]:
    """Rank several sites in one pass over the pairs."""
    rules = _choose(PROTOCOLS, protocol, "protocol")
    kind = _choose(MOMENTA, momentum, "momentum")
    if momentum == "causal" and protocol == "paper":
        raise AUSteerError("causal momentum is not the paper's; use it with protocol='clean'")
    for site in sites:
        rmodels.site_shape(model, site)
    if not rules.share_prompt and (batch_size is not None or max_length is not None):
        raise AUSteerError(
            "--protocol paper runs one text at a time, cut at 512 tokens: leave out the batch size and the longest length"
        )
    pairs = _as_pairs(train_dataset, rules)
    context = model.config.max_position_embeddings
    limit = _longest(rules, model, max_length)
    if max_length is not None and not 1 <= max_length <= context:
        raise AUSteerError(
            f"the longest text must be from 1 to {context} tokens (the model's context), not {max_length}"
        )
    if batch_size is not None and batch_size < 1:
        raise AUSteerError(f"the batch size must be at least 1, not {batch_size}")
    encoded, equal = encode(pairs, tokenizer, rules, limit)
    if momentum == "causal" and len(pairs) < 2:
        raise AUSteerError("causal momentum needs at least two pairs: it is ranked by a t statistic")

    made_by = model_header(model)  # before the forwards: what fails here fails early
    state = PartialState()
    mine = encoded[state.process_index :: state.num_processes]
    size = batch_size if rules.share_prompt else 1
    tokens = BATCH_TOKENS.get(model.device.type, 8192)
    total = kind(model, sites, rules)
    _run(total, batches(mine, size, tokens), len(mine), progress and state.is_main_process)
    if state.num_processes > 1:
        _add_over_processes(total)
    not_finite = int(total.not_finite)
    if not_finite and rules.refuse_overflow:
        raise AUSteerError(
            f"{not_finite} values are inf or nan in {model.dtype}: the ranks would be noise; "
            "load the model in bfloat16 or float32"
        )
    if not_finite:
        warnings.warn(
            f"{not_finite} activations are inf or nan in {model.dtype}; the authors' code counts on", stacklevel=2
        )
    header = {
        **made_by,
        "tokenizer": public_name(tokenizer.name_or_path),
        "pairs": len(pairs),
        "pairs_hash": pairs_hash(pairs),
        "pairs_with_equal_tokens": equal,
        "not_finite": not_finite,
        "protocol": protocol,
        "momentum": momentum,
        "max_length": limit,
        "tie_rule": "lower layer, then lower dimension",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return {site: _ranks(total, site, len(pairs), header) for site in sites}


def _longest(rules: Protocol, model: PreTrainedModel, max_length: int | None) -> int:
    """The longest text in tokens. The authors cut at 512 whatever the context."""
    return rules.cut_at or max_length or model.config.max_position_embeddings


def ranks_file(path: str | Path, site: str) -> Path:
    """Where ranks go: `path` itself, or <site>.safetensors in it if it names a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"{site}.safetensors"


def _as_pairs(train_dataset: Sequence[Sequence[str]], rules: Protocol) -> list[Pair]:
    try:
        pairs = [Pair(*row) for row in train_dataset if not isinstance(row, str)]
    except TypeError:
        pairs = []
    if len(pairs) < len(train_dataset):
        raise AUSteerError("every pair must be [prompt, right answer, wrong answer]")
    if rules.first_pairs is None:
        check_pairs(pairs)
    elif not pairs:
        raise AUSteerError("no pairs given; ranking needs at least one")
    return pairs[: rules.first_pairs]


def batches(encoded: Sequence[EncodedPair], size: int | None, tokens: int) -> list[list[EncodedPair]]:
    """Pairs of like length together, `size` at once or as many as `tokens` allow.

    Longest first, so what does not fit in memory shows at once.
    """
    made: list[list[EncodedPair]] = []
    for pair in sorted(encoded, key=lambda pair: (bool(pair.prefix), pair.cost), reverse=True):
        # a batch is padded to its longest prompt and its longest tail, of which every pair has two
        batch = [*made[-1], pair] if made else [pair]
        padded = max(len(p.prefix) for p in batch) + 2 * max(p.tail for p in batch)
        room = len(batch) <= size if size else len(batch) * padded <= tokens
        # never mixed: beside prompts, a pair without one would be a row of padding, which has no attention
        if len(batch) > 1 and room and bool(batch[0].prefix) == bool(pair.prefix):
            made[-1].append(pair)
        else:
            made.append([pair])
    return made


def _run(total: Momentum, todo: list[list[EncodedPair]], count: int, progress: bool) -> None:
    with tqdm(total=count, desc="screening", unit=" pairs", disable=None if progress else True) as bar:
        queue = todo[::-1]
        while queue:
            batch = queue.pop()
            try:
                total.add(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise AUSteerError(
                        "out of memory with a single pair; use --max-length, 4-bit, or a larger GPU"
                    ) from error
                half = (len(batch) + 1) // 2
                waiting = [batch, *queue[::-1]]
                queue = [b[i : i + half] for b in waiting for i in range(0, len(b), half)][::-1]
                bar.write(f"out of memory with {len(batch)} pairs at once; going on with {half}")
            else:
                bar.update(len(batch))
                continue
            if torch.cuda.is_available():  # outside the except: the error's traceback would keep tensors alive
                torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _add_over_processes(total: Momentum) -> None:
    shared_work.all_say(True)  # or one has failed, and there is nothing to add
    for by_name in total.sums.values():
        for rows in by_name.values():
            for row in rows:
                torch.distributed.all_reduce(row)
    torch.distributed.all_reduce(total.not_finite)


def _ranks(total: Momentum, site: str, n: int, header: dict) -> AURanks:
    stats = {name: values.cpu() for name, values in total.stats(site).items()}
    if header["momentum"] == "causal":
        score = _t_statistic(stats["sum"], stats["sum_squares"], n)
        return AURanks(site, score, score.sign(), stats, header)
    positive, negative = stats["positive"], stats["negative"]
    # all pairs count, also those without a difference; a tie of signs is positive (the authors' code)
    share = torch.maximum(positive, negative).float() / n
    score = torch.where(positive < negative, -share, share)
    return AURanks(site, score, score.clone(), stats, header)


def _t_statistic(total: torch.Tensor, squares: torch.Tensor, n: int) -> torch.Tensor:
    mean = total / n
    variance = ((squares - n * mean.square()) / (n - 1)).clamp(min=0)
    # an effect that is the same in every pair has no spread: bound its t instead of dividing by zero
    error = torch.maximum((variance / n).sqrt(), 1e-9 * mean.abs())
    return torch.where(mean == 0, 0.0, mean / error).float()


def _choose(table: dict, name: str, what: str):
    if name not in table:
        raise AUSteerError(f"{what} {name!r} is unknown; use one of {', '.join(table)}")
    return table[name]


def _arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rank every atomic unit of a model by its momentum over contrastive pairs.",
        epilog="Pairs are JSON Lines of {prompt, positive, negative}, or CSV with those columns. "
        "For several GPUs: accelerate launch MFU_screening.py ...",
    )
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder of a checkpoint")
    add("--pairs", required=True, help="file of contrastive pairs (.jsonl or .csv)")
    add("--site", nargs="+", default=["ffn"], choices=rmodels.SITES, help="which activations (default: ffn)")
    add("--out", required=True, help="ranks file (.safetensors), or a folder that gets <site>.safetensors")
    add("--momentum", default="activation", choices=MOMENTA, help="the paper's, or ours (default: %(default)s)")
    add("--protocol", default="clean", choices=PROTOCOLS, help="clean, or the authors' code (default: %(default)s)")
    add("--fields", nargs=3, default=["prompt", "positive", "negative"], metavar=("PROMPT", "RIGHT", "WRONG"),
        help="names of the three fields in the file of pairs")  # fmt: skip
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the checkpoint's)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--device-map", help="spread one model over several GPUs: auto, balanced, ... (instead of --device)")
    add("--quantization", choices=["4bit", "8bit"], help="load through bitsandbytes")
    add("--attn", help="attention kernel: sdpa, eager, flash_attention_2, flash_attention_3")
    add("--revision", help="revision of the checkpoint on the hub")
    add("--batch-size", type=int, help="pairs at once; halved by itself when memory runs out")
    add("--max-length", type=int, help="longest text in tokens; a longer prompt loses its start")
    add("--authors-files", metavar="FOLDER", help="also write the authors' three .pt files")
    add("--force", action="store_true", help="replace ranks that answer another question")
    return parser.parse_args(argv)


def main(argv: Iterable[str] | None = None) -> None:
    args = _arguments(argv)
    if len(args.site) > 1 and args.out.endswith(".safetensors"):
        raise AUSteerError("--out must be a folder when several sites are ranked")
    rules = PROTOCOLS[args.protocol]
    pairs = read_pairs(args.pairs, args.fields, check=rules.first_pairs is None)[: rules.first_pairs]
    for site in args.site:
        check_writable(ranks_file(args.out, site))
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    device = args.device
    if device is None and args.device_map is None and state.num_processes > 1:
        device = str(state.device)
    model = rmodels.load(
        args.model, dtype=args.dtype, device=device, device_map=args.device_map, quantization=args.quantization,
        attn_implementation=args.attn, revision=args.revision,
    )  # fmt: skip
    tokenizer = rmodels.load_tokenizer(args.model, revision=args.revision)
    question = {
        "fingerprint": fingerprint(model), "pairs_hash": pairs_hash(pairs), "protocol": args.protocol,
        "momentum": args.momentum, "tokenizer": public_name(tokenizer.name_or_path),
        "max_length": _longest(rules, model, args.max_length),
    }  # fmt: skip
    wanted = [site for site in args.site if not _already_there(ranks_file(args.out, site), question, args.force)]
    wanted = shared_work.of_first(lambda: wanted)  # other nodes may not see the same disk
    if wanted:
        started = time.monotonic()
        found = screen(
            pairs, model, tokenizer, wanted, protocol=args.protocol, momentum=args.momentum,
            batch_size=args.batch_size, max_length=args.max_length,
        )  # fmt: skip
        seconds = time.monotonic() - started
    if not state.is_main_process:
        return
    for site in wanted:
        file = ranks_file(args.out, site)
        found[site].save(file)
        layers, width = found[site].score.shape
        print(f"{file}: {layers} x {width} AUs at site {site}, {len(pairs)} pairs, {len(pairs) / seconds:.1f} pairs/s")
        best = ", ".join(f"({layer}, {dim}) {score:+.3f}" for layer, dim, score in found[site].top(5))
        print(f"  best (layer, dim): {best}; {found[site].ties(100)} more tie with the 100th")
    for site in args.site if args.authors_files else ():
        AURanks.load(ranks_file(args.out, site)).save_authors(Path(args.authors_files) / site)


def _already_there(file: Path, question: dict, force: bool) -> bool:
    if not file.exists() or force:
        return False
    header = AURanks.load(file).header
    if all(header.get(key) == value for key, value in question.items()):
        print(f"{file}: already there, same model, pairs and protocol")
        return True
    differs = ", ".join(key for key, value in question.items() if header.get(key) != value)
    raise AUSteerError(f"{file} exists and differs in {differs}; choose another --out, or --force to replace it")


if __name__ == "__main__":
    run_command(main)
