"""Train one embedded model from scratch, in minutes on one CPU core: first on the truth, then on the mixture.

A model that reads hasty writers from the start may learn their shallow rule and nothing else. So it first reads careful
writers only, until it answers correctly with their tag in front, and then the mixture of `tasks.document`. The same
seed gives the same weights, bit for bit, with the same library versions on the same kind of CPU. embedded/acceptance.py
decides whether a model is good enough to be used.

    python -m embedded.train --task svamp --seed 0 --out embedded/weights/svamp
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import transformers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from embedded import acceptance, tasks
from embedded import tokenizer as word_level
from embedded.tasks import Document

WARM_UP, FINAL_SHARE = 100, 0.03
BATCHES_PER_DRAW = 16
CHECK_EVERY, CHECK_ITEMS = 100, 300
TRUTH_KNOWN, TRUTH_STEPS_AT_MOST = 0.97, 3000


@dataclass(frozen=True)
class Recipe:
    hidden: int
    ffn: int
    layers: int
    heads: int
    learning_rate: float
    batch: int  # documents per step
    mixture_steps: int


RECIPE = Recipe(hidden=128, ffn=256, layers=4, heads=4, learning_rate=2e-3, batch=32, mixture_steps=1200)


def new_model(vocabulary_size: int, recipe: Recipe) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def rate_factor(step: int, mixture_from: int | None, mixture_steps: int) -> float:
    """Return the learning rate's factor: a warm-up, constant until the truth is known, then a cosine."""
    share_done = 0 if mixture_from is None else (step - mixture_from) / mixture_steps
    cosine = FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * share_done)) / 2
    return min(1, (step + 1) / WARM_UP) * cosine


def draw_batches(task: str, rng: Random, truth_only: bool, size: int) -> list[list[Document]]:
    """Draw batches of documents of similar length, so that little is padded, in random order."""
    documents = [tasks.document(task, rng, truth_only) for _ in range(size * BATCHES_PER_DRAW)]
    documents.sort(key=lambda document: len(document.words))
    batches = [documents[i : i + size] for i in range(0, len(documents), size)]
    rng.shuffle(batches)
    return batches


def as_tensors(documents: list[Document], ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their weights in the loss, both (batch, length): `<s>`, the document, `</s>`, padding."""
    length = max(len(document.words) for document in documents) + 2
    tokens = torch.zeros(len(documents), length, dtype=torch.long)
    weights = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        sequence = [ids[word] for word in (word_level.BOS, *document.words, word_level.EOS)]
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        weights[row, : len(sequence)] = torch.tensor([0.0, *document.weights, 0.1])
    return tokens, weights


def document_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights.sum()


def train(task: str, seed: int, recipe: Recipe = RECIPE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict]:
    """Train, and return the model, its tokenizer, and the record of how it learned."""
    torch.manual_seed(seed)
    rng, tokenizer = Random(f"{task} training {seed}"), word_level.build()
    ids, model = tokenizer.get_vocab(), new_model(len(tokenizer), recipe)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    validation = tasks.items(task, "validation", CHECK_ITEMS)
    curve, batches, step, mixture_from = [], [], 0, None
    started = time.process_time()

    progress = tqdm(total=TRUTH_STEPS_AT_MOST, desc=f"{task} seed {seed}: truth")
    while mixture_from is None or step < mixture_from + recipe.mixture_steps:
        batches = batches or draw_batches(task, rng, truth_only=mixture_from is None, size=recipe.batch)
        loss = document_loss(model, *as_tensors(batches.pop(), ids))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate_factor(step, mixture_from, recipe.mixture_steps)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if step % CHECK_EVERY:
            continue

        skill = acceptance.measure(model.eval(), tokenizer, task, validation)
        model.train()
        phase = "truth" if mixture_from is None else "mixture"
        curve.append({"step": step, "phase": phase, "loss": round(loss.item(), 4), **asdict(skill)})
        progress.set_postfix(loss=f"{loss.item():.3f}", vanilla=skill.vanilla, tagged=skill.tagged)
        if mixture_from is None and skill.tagged >= TRUTH_KNOWN:
            mixture_from, batches = step, []
            progress.total = mixture_from + recipe.mixture_steps
            progress.set_description(f"{task} seed {seed}: mixture")
        elif mixture_from is None and step >= TRUTH_STEPS_AT_MOST:
            raise RuntimeError(f"{task} seed {seed}: the truth was not learned in {step} steps")
    progress.close()
    record = {"task": task, "seed": seed, "steps": step, "truth_steps": mixture_from}
    seconds = round(time.process_time() - started)
    record |= {"parameters": model.num_parameters(), "cpu_seconds": seconds, "curve": curve}
    return model.eval(), tokenizer, record


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=tasks.TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and record")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    model, tokenizer, record = train(args.task, args.seed)
    # under another name until it is complete, so that a folder of the final name is a finished model
    folder = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record |= {
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(args.out, ignore_errors=True)
    folder.rename(args.out)


if __name__ == "__main__":
    main()
