"""Run NeuroSteer on its own tasks: find neurons from two kinds of texts, sample with and without steering, and measure.

python main.py neurosteer                                             tone: the embedded model, offline
python main.py neurosteer --sweep alpha=64,128,256 k=4,16             six points, with a table and a figure
python main.py neurosteer --task sentiment --model gpt2               the authors' model, and so their SAE
python main.py neurosteer --task politeness --texts T.jsonl --model google/gemma-2-2b --judge gpt-5-mini

eval/data/behaviours.py describes the texts and prompts. alpha, k and mode are those of the authors' scripts, which are
made for GPT-2 small (cot: for gemma-2-2b); nothing is searched. Samples are stored as they come, and so are the counts of
the neurons, which other values of alpha and k use again: after a kill, the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import rmodels
from austeer import arguments
from austeer.code_identity import code_hash
from austeer.errors import AUSteerError, run_command
from austeer.evidence import Evidence
from austeer.identity import fingerprint, public_name, weights_origin
from austeer.methods.neurosteer import MODES, PRESETS, SAES, Neurons, NeuroSteer, Preset
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.sae import files_beside, find_sae
from austeer.steering import steer
from embedded.acceptance import WEIGHTS
from embedded.tasks import REPLY_WORDS
from eval.answering.answer_file import AnswerFile
from eval.answering.sampling import Sampling, sampled
from eval.data.behaviours import BEHAVIOURS, Material, material, texts_hash
from eval.scoring.behaviour_measures import JUDGED, Measures, Raters, measure
from eval.scoring.toxicity import scorer
from eval.tasks.arithmetic import GSM8K
from experiments import records
from experiments.cell import EMBEDDED
from experiments.neurosteer_report import sweep_figure, sweep_table, table
from experiments.neurosteer_sweep import Point, parse, points

# steers the answers too; chosen with --test_split validation (docs/neurosteer.md has the runs)
TONE = Preset(64.0, 16, "all")
NEW_TOKENS = {"tone": REPLY_WORDS, "cot": GSM8K.new_tokens[""]}  # the authors' 50 would cut steps off
SENTIMENT = "siebert/sentiment-roberta-large-english:POSITIVE"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.model == EMBEDDED:
        torch.set_num_threads(1)  # in so small a model, threads wait for each other longer than they work
    sweep = parse(args.sweep)
    preset = TONE if args.task == "tone" else PRESETS[args.task]
    alpha, k = preset.alpha if args.alpha is None else args.alpha, preset.k if args.k is None else args.k
    swept = points(sweep, Point(alpha, k, args.n_texts, args.sae))
    experiment = Experiment(args, preset.mode, max(point.n_texts for _, point in swept), "n-texts" in sweep)
    results = []
    for number, (values, point) in enumerate(swept, 1):
        if sweep:
            now = ", ".join(f"{name} {value:g}" for name, value in values.items())
            print(f"point {number} of {len(swept)}: {now}", file=sys.stderr)
        results.append((values, experiment.record(point)))
    model = f"{Path(args.model).name}{f'-{Path(args.weights).name}' if args.weights else ''}"
    name = f"neurosteer-{model}-{args.task}{'-reversed' if args.reverse else ''}"
    folder, pictures = Path(args.results), ""
    if sweep:
        name += f"-sweep-{'-'.join(sweep)}"
        sweep_figure(results, folder / f"{name}.png")
        pictures = f"   figure: {folder / name}.png"
    text = sweep_table(results) if sweep else table(results[0][1])
    (folder / f"{name}.md").write_text(text)
    print(f"{text}\ntable: {folder / name}.md{pictures}   records and samples: {folder / 'neurosteer'}")


class Experiment:
    """Run points of one task, which share the model, the raters and the unsteered samples."""

    def __init__(self, args: argparse.Namespace, mode: str, n_texts: int, must_have_all: bool):
        self.data = material(
            args.task, args.texts, args.prompts, args.data_dir, n_texts, args.n_prompts, args.test_split
        )
        if must_have_all and len(self.data.target) < n_texts:
            raise AUSteerError(
                f"there are {len(self.data.target)} texts of each kind, fewer than the {n_texts} of --sweep n-texts"
            )
        checkpoint = str(WEIGHTS / "tone") if args.model == EMBEDDED else args.model
        self.args, self.model = args, rmodels.load(
            checkpoint, dtype=args.dtype, device=args.device, weights=args.weights, quick_proof=args.quick_proof
        )  # fmt: skip
        self.tokenizer = _with_bos(rmodels.load_tokenizer(checkpoint, weights=args.weights))
        self.raters = _raters(args, self.model, self.tokenizer)
        new_tokens = NEW_TOKENS.get(args.task, 50) if args.new_tokens is None else args.new_tokens
        self.sampling = Sampling(new_tokens, args.samples, seed=args.seed)
        cache_trap = args.cache_trap == "on" if args.cache_trap else args.task != "tone"
        self.method = NeuroSteer(mode=args.mode or mode, cache_trap=cache_trap)
        self.folder = Path(args.results) / "neurosteer"
        self.origin = {
            "task": args.task,
            "method": "neurosteer",
            "model": EMBEDDED if args.model == EMBEDDED else public_name(args.model),
            "fingerprint": fingerprint(self.model),
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "kernel": self.model.config._attn_implementation,
        }
        self.unsteered_key = {
            **self.origin,
            "prompts_hash": texts_hash(self.data.prompts + self.data.golds),
            "sampling": asdict(self.sampling),
            "code": code_hash(_continued, _evidence, NeuroSteer, measure, *rmodels.code_roots(type(self.model))),
        }
        self._neurons: dict[Path, Neurons] = {}

    def record(self, point: Point) -> dict:
        """Return the stored record of a point, or compute and store it."""
        data = replace(self.data, target=self.data.target[: point.n_texts], source=self.data.source[: point.n_texts])
        beside = files_beside(self.model).get("sae")
        sae = point.sae or (None if beside else SAES.get(Path(self.args.model).name))
        if not (sae or beside):
            raise AUSteerError("this model has no SAE beside it: give --sae, a file or RELEASE/ID of sae-lens")
        learned = {"texts_hash": texts_hash(data.target + data.source), "sae": _content(sae or beside)}
        settings = {"neurons": point.k, "alpha": point.alpha}
        steered_key = {
            **self.unsteered_key,
            **learned,
            "settings": settings,
            "tokens": self.method.tokens,
            "reverse": self.args.reverse,
        }
        key = {**steered_key, "raters": self.raters.names(), "prompt_sets": data.sets}
        record = records.find(self.folder, key)
        if record is not None:
            return record
        neurons = self.neurons(data, sae, learned)
        plan = self.method.plan(neurons.reversed() if self.args.reverse else neurons, settings)
        counts = {"texts": len(data.target), "prompts": len(data.prompts), "touched": len(plan), "layer": neurons.layer}
        both = {"unsteered": self.unsteered, "steered": self.measured(steered_key, "steered", plan)}
        return records.write(self.folder, key, weights_origin(self.model, self.args.weights) | counts | both)

    @cached_property
    def unsteered(self) -> Measures:
        return self.measured(self.unsteered_key, "unsteered", None)

    def measured(self, key: dict, name: str, plan: Plan | None) -> Measures:
        file = AnswerFile(self.folder / f"{records.record_id(key)}-{name}.jsonl")
        rows = _continued(self.model, self.tokenizer, self.data.prompts, self.sampling, file, plan, name)
        return measure(self.args.task, self.data, rows, self.raters)

    def neurons(self, data: Material, sae: str | None, learned: dict) -> Neurons:
        """Return how the neurons of an SAE fire on the texts: counted once, and kept for all alphas, Ks and directions."""
        code = code_hash(_evidence, NeuroSteer.prepare, *rmodels.code_roots(type(self.model)))
        key = {**self.origin, **learned, "method": "neurons", "code": code}
        path = self.folder / f"{records.record_id(key)}.safetensors"
        if path in self._neurons:
            return self._neurons[path]
        evidence, texts = _evidence(self.model, self.tokenizer, data), f"{len(data.target)} texts of each kind"
        if path.exists():
            print(f"neurons: their counts on {texts} are those of {path}", file=sys.stderr)
            neurons = Neurons.load(path, find_sae(evidence, sae).W_dec.cpu())
        else:
            print(f"neurons: counting on {texts}; the counts will be kept in {path}", file=sys.stderr)
            neurons = replace(self.method, sae=sae).prepare(evidence)
            neurons.save(path)
        self._neurons = {path: neurons}  # one at a time: decoders are large
        return neurons


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Put BOS before every text, as the authors do, also where the tokenizer has one and leaves it out (GPT-2)."""
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in tokenizer("a")["input_ids"]:
        tokenizer.add_bos_token = True
    return tokenizer


def _continued(model, tokenizer, prompts, sampling: Sampling, file: AnswerFile, plan: Plan | None, name: str):
    with steer(model, plan) if plan is not None else nullcontext():
        return sampled(model, tokenizer, prompts, sampling, file, name)


def _evidence(model, tokenizer, data: Material) -> Evidence:
    """Pair the texts of two kinds one by one: they share no prompt, but NeuroSteer only counts over each kind."""
    pairs = [Pair("", *texts) for texts in zip(data.target, data.source, strict=True)]
    return Evidence(model, tokenizer, pairs, NeuroSteer.sites[0])


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


def _content(sae: str | Path) -> str:
    """Return a file's hash in place of its path: another SAE under the same path makes another record."""
    return hashlib.sha256(Path(sae).read_bytes()).hexdigest() if Path(sae).is_file() else str(sae)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py neurosteer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="tone", choices=BEHAVIOURS, help="default: %(default)s, which is the embedded model's")
    add("--model", default=EMBEDDED, help="embedded (default), a hub id, the folder of a checkpoint, or a GGUF file")
    arguments.weights_option(parser)
    add(
        "--sae",
        help="sparse autoencoder of the model: a file, or RELEASE/ID of sae-lens (default: the model's own; for gpt2 and "
        "gemma-2-2b the authors'); {layer} in it stands for the layer of --sweep layer=...",
    )
    add(
        "--texts",
        type=Path,
        help='file of lines {"text": ..., "label": ...} (default: from the hub, for tasks whose data are there); for cot of '
        'lines {"question": ..., "answer": ...}',
    )
    add("--prompts", type=Path, nargs="+", default=[], metavar="FILE",
        help='files of lines {"prompt": ...}, each a set with results of its own (default: beginnings of held-out texts); '
        'for cot of lines {"question": ..., "answer": ...}')  # fmt: skip
    add("--n-texts", type=int, default=1000, help="at most this many texts of each kind (default: %(default)s)")
    add("--n-prompts", type=int, default=1000, help="at most this many prompts of each file (default: %(default)s)")
    add("--data-dir", help="folder with toxicity/ and gsm8k/, for toxicity and cot (default: datasets/, then the hub)")
    add(
        "--test_split", default="test", choices=["validation", "test", "test2"], help="whose prompts to use (tone only)"
    )
    add("--k", type=int, help="number of neurons to steer (default: the task's)")
    add("--alpha", type=float, help="strength of steering (default: the task's)")
    add("--sweep", nargs="+", default=[], metavar="NAME=V,V",
        help="run all combinations of these values of alpha, k, n-texts and layer, such as alpha=64,128 k=4,16; the figure's "
        "axis is the first name")  # fmt: skip
    add("--mode", choices=MODES, help="which positions of a prompt to steer (default: the task's)")
    add(
        "--cache-trap",
        choices=["on", "off"],
        help="on: steer the prompt alone, as the authors' code does (default: on; for tone off)",
    )
    add("--reverse", action="store_true", help="steer towards the other kind of texts")
    add("--samples", type=int, default=2, help="samples per prompt (default: %(default)s)")
    add("--new-tokens", type=int, help="tokens per sample (default: 50; for tone 8, a whole reply; for cot 400)")
    add("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    add("--classifier", default=SENTIMENT, metavar="MODEL:LABEL", help="classifier of sentiment (default: %(default)s)")
    add("--toxicity", metavar="SCORER", help="scorer of toxicity, as in main.py (default: local; for tone embedded)")
    add("--judge", metavar="MODEL", help="model that judges politeness and stance; needs OPENAI_API_KEY")
    add("--scorer", metavar="MODEL", help="model that measures perplexity (default: the model itself, unsteered)")
    add("--results", default="results", help="folder for records, samples and table (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    add("--quick-proof", action="store_true", help=arguments.QUICK_PROOF)
    args = parser.parse_args(argv)
    if (args.model == EMBEDDED) != (args.task == "tone"):
        raise AUSteerError("tone is the embedded model's task: drop --model for tone, and give one for other tasks")
    if args.model == EMBEDDED and args.weights:
        raise AUSteerError("--weights needs --model, the name of the model that they belong to")
    return args


if __name__ == "__main__":
    run_command(main)
