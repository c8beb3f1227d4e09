"""Run NeuroSteer on its own tasks: find neurons from two kinds of texts, sample with and without steering, and measure.

python main.py neurosteer                                             tone: the embedded model, offline
python main.py neurosteer --task politeness --texts T.jsonl --model google/gemma-2-2b \\
    --sae gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical --judge gpt-5-mini

eval/data/behaviours.py describes the texts and prompts. alpha, k and mode are those of the authors' scripts, which are
made for GPT-2 small; nothing is searched. Samples are stored as they come: after a kill, the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import rmodels
from austeer.code_identity import code_hash
from austeer.errors import AUSteerError, run_command
from austeer.evidence import Evidence
from austeer.identity import fingerprint, public_name
from austeer.methods.neurosteer import MODES, PRESETS, NeuroSteer, Preset
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.steering import steer
from embedded.acceptance import WEIGHTS
from embedded.tasks import REPLY_WORDS
from eval.answering.answer_file import AnswerFile
from eval.answering.sampling import Sampling, sampled
from eval.data.behaviours import BEHAVIOURS, Material, material, texts_hash
from eval.scoring.behaviour_measures import JUDGED, Measures, Raters, measure
from eval.scoring.toxicity import scorer
from eval.statistics import paired_bootstrap
from experiments import records
from experiments.cell import EMBEDDED

# steers the answers too; chosen with --test_split validation (docs/methods.md has the runs)
TONE = Preset(128.0, 16, "all")
SENTIMENT = "siebert/sentiment-roberta-large-english:POSITIVE"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    record = run(args)
    name = f"neurosteer-{Path(args.model).name}-{args.task}{'-reversed' if args.reverse else ''}.md"
    text = table(record)
    (Path(args.results) / name).write_text(text)
    print(f"{text}\ntable: {Path(args.results) / name}   records and samples: {Path(args.results) / 'neurosteer'}")


def run(args: argparse.Namespace) -> dict:
    """Return the stored record of one task, or compute and store it."""
    data = material(args.task, args.texts, args.prompts, args.data_dir, args.n_texts, args.n_prompts, args.test_split)
    checkpoint = str(WEIGHTS / "tone") if args.model == EMBEDDED else args.model
    model = rmodels.load(checkpoint, dtype=args.dtype, device=args.device)
    tokenizer = rmodels.load_tokenizer(checkpoint)
    raters = _raters(args, model, tokenizer)
    sampling = Sampling(args.new_tokens or (REPLY_WORDS if args.task == "tone" else 50), args.samples, seed=args.seed)
    preset = TONE if args.task == "tone" else PRESETS[args.task]
    point = {"neurons": args.k or preset.k, "alpha": preset.alpha if args.alpha is None else args.alpha}
    cache_trap = args.cache_trap == "on" if args.cache_trap else args.task != "tone"
    method = NeuroSteer(args.sae, mode=args.mode or preset.mode, cache_trap=cache_trap)
    folder = Path(args.results) / "neurosteer"
    unsteered_key = {
        "task": args.task,
        "method": "neurosteer",
        "model": EMBEDDED if args.model == EMBEDDED else public_name(args.model),
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "prompts_hash": texts_hash(data.prompts),
        "sampling": asdict(sampling),
        "code": code_hash(_continued, NeuroSteer, measure, type(model)),
    }
    steered_key = unsteered_key | {
        "texts_hash": texts_hash(data.target + data.source),
        "sae": _content(args.sae),
        "settings": point,
        "tokens": method.tokens,
        "reverse": args.reverse,
    }
    key = steered_key | {"raters": raters.names()}
    record = records.find(folder, key)
    if record is not None:
        return record
    plan = method.plan(method.prepare(_evidence(model, tokenizer, data, args.reverse)), point)
    measures: list[Measures] = []
    for name, side_key, side_plan in (("unsteered", unsteered_key, None), ("steered", steered_key, plan)):
        file = AnswerFile(folder / f"{records.record_id(side_key)}-{name}.jsonl")
        rows = _continued(model, tokenizer, data.prompts, sampling, file, side_plan, name)
        measures.append(measure(args.task, data.prompts, rows, raters))
    counts = {"texts": len(data.target), "prompts": len(data.prompts), "touched": len(plan)}
    return records.write(folder, key, {**counts, "unsteered": measures[0], "steered": measures[1]})


def _continued(model, tokenizer, prompts, sampling: Sampling, file: AnswerFile, plan: Plan | None, name: str):
    with steer(model, plan) if plan is not None else nullcontext():
        return sampled(model, tokenizer, prompts, sampling, file, name)


def _evidence(model, tokenizer, data: Material, reverse: bool) -> Evidence:
    """Pair the texts of two kinds one by one: they share no prompt, but NeuroSteer only counts over each kind."""
    kinds = (data.source, data.target) if reverse else (data.target, data.source)
    pairs = [Pair("", *texts) for texts in zip(*kinds, strict=True)]

    def no_ranks(momentum: str):
        raise AssertionError("NeuroSteer looks at no ranks")

    return Evidence(model, tokenizer, pairs, NeuroSteer.sites[0], no_ranks)


def _raters(args: argparse.Namespace, model, tokenizer) -> Raters:
    """Return the raters that the task needs, before sampling: a wrong name should not show only after an hour."""
    cache = Path(args.results) / "perspective.jsonl"
    toxicity = args.toxicity or ("embedded" if args.task == "tone" else "local")
    return Raters(
        _perplexity_scorer(args.scorer, model, tokenizer, args.device),
        scorer(f"local:{args.classifier}", device=args.device) if args.task == "sentiment" else None,
        scorer(toxicity, cache, args.device) if args.task in ("toxicity", "tone") else None,
        args.judge if args.task in JUDGED else None,
        Path(args.results) / "judge.jsonl",
    )


def _perplexity_scorer(name: str | None, model, tokenizer, device: str | None) -> tuple:
    if name is None:
        return "the same model, unsteered", model, tokenizer
    try:
        theirs = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AUSteerError(f"cannot load --scorer {name}: {str(error).strip().splitlines()[0]}") from None
    return public_name(name), theirs.eval().to(rmodels.check_device(device)), words


def _content(sae: str | None) -> str | None:
    """Return a file's hash in place of its path: another SAE under the same path makes another record."""
    return hashlib.sha256(Path(sae).read_bytes()).hexdigest() if sae and Path(sae).is_file() else sae


def table(record: dict) -> str:
    """Return a Markdown table, a line per measure: steered against unsteered."""
    behaviour, sampling = BEHAVIOURS[record["task"]], record["sampling"]
    towards = behaviour.source if record["reverse"] else behaviour.target
    k, alpha = record["settings"]["neurons"], record["settings"]["alpha"]
    lines = [
        f"## NeuroSteer, {record['task']}, towards {towards}: {record['model']}",
        "",
        f"{k} neurons from {record['texts']} texts of each kind, alpha {alpha:g}, steered tokens: {record['tokens']}; "
        f"{record['prompts']} prompts, {sampling['samples']} samples each, {sampling['new_tokens']} new tokens, seed {sampling['seed']}; "
        "[95 % interval, paired bootstrap over prompts]",
        "",
        "| measure | unsteered | steered | difference |",
        "|---|--:|--:|--:|",
    ]
    for name, before in record["unsteered"].items():
        after = record["steered"][name]
        if isinstance(before, str):
            cells = ("-", "-", before)
        elif isinstance(before, list):
            gain, low, high = paired_bootstrap(before, after)
            means = (sum(values) / len(values) for values in (before, after))
            cells = (*(f"{mean:.3f}" for mean in means), f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]")
        else:
            cells = (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py neurosteer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="tone", choices=BEHAVIOURS, help="default: %(default)s, which is the embedded model's")
    add("--model", default=EMBEDDED, help="embedded (default), a hub id, or the folder of a checkpoint")
    add(
        "--sae",
        help="sparse autoencoder of the model: a file, or RELEASE/ID of sae-lens (default for embedded: its own)",
    )
    add(
        "--texts",
        type=Path,
        help='file of lines {"text": ..., "label": ...} (default: from the hub, for tasks whose data are there)',
    )
    add("--prompts", type=Path, help='file of lines {"prompt": ...} (default: beginnings of held-out texts)')
    add("--n-texts", type=int, default=1000, help="at most this many texts of each kind (default: %(default)s)")
    add("--n-prompts", type=int, default=1000, help="at most this many prompts (default: %(default)s)")
    add("--data-dir", help="folder with toxicity/, for its prompts (default: datasets/, then the hub)")
    add(
        "--test_split", default="test", choices=["validation", "test", "test2"], help="whose prompts to use (tone only)"
    )
    add("--k", type=int, help="number of neurons to steer (default: the task's)")
    add("--alpha", type=float, help="strength of steering (default: the task's)")
    add("--mode", choices=MODES, help="which positions of a prompt to steer (default: the task's)")
    add(
        "--cache-trap",
        choices=["on", "off"],
        help="on: steer the prompt alone, as the authors' code does (default: on; for tone off)",
    )
    add("--reverse", action="store_true", help="steer towards the other kind of texts")
    add("--samples", type=int, default=2, help="samples per prompt (default: %(default)s)")
    add("--new-tokens", type=int, help="tokens per sample (default: 50; for tone 8, a whole reply)")
    add("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    add("--classifier", default=SENTIMENT, metavar="MODEL:LABEL", help="classifier of sentiment (default: %(default)s)")
    add("--toxicity", metavar="SCORER", help="scorer of toxicity, as in main.py (default: local; for tone embedded)")
    add("--judge", metavar="MODEL", help="model that judges politeness and stance; needs OPENAI_API_KEY")
    add("--scorer", metavar="MODEL", help="model that measures perplexity (default: the model itself, unsteered)")
    add("--results", default="results", help="folder for records, samples and table (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    args = parser.parse_args(argv)
    if (args.model == EMBEDDED) != (args.task == "tone"):
        raise AUSteerError("tone is the embedded model's task: drop --model for tone, and give one for other tasks")
    return args


if __name__ == "__main__":
    run_command(main)
