"""Speed of answering, as ratios from one run on this machine.

    python benchmarks/answering.py [--threads 1] [--repeats 3] [--out FILE.json]

The model is a random Llama (hidden 512, 8 layers, as in core.py), with prompts of about 146 tokens. "plain" is the
authors' way: one prompt at a time through `generate`. One-token answers are timed twice: on prompts that share nothing,
and on prompts that begin with the same instruction of 24 tokens, as those of a task do. "matmul floor" runs the matrix
products alone, in the shapes of the plain way for one token and in the shapes of a batch for many.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from core import VOCABULARY, build, median_seconds
from figures import keep, show

from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer

PROMPTS, LENGTH, INSTRUCTION, NEW, BATCH = 32, 146, 24, 64, 16


class Tokens:
    """Stand in for a tokenizer: prompts are token ids already, so that only the model is timed."""

    all_special_ids: tuple = ()

    def __call__(self, prompts, **_):
        return {"input_ids": [list(prompt) for prompt in prompts]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def prompts(count: int, shared: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    beginning = torch.randint(3, VOCABULARY, (shared,), generator=generator).tolist()
    rows = []
    for _ in range(count):
        length = LENGTH - shared + int(torch.randint(-8, 9, (), generator=generator))
        rows.append((*beginning, *torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()))
    return rows


def plain(model, inputs, new_tokens: int) -> list[list[int]]:
    answers = []
    for prompt in inputs:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def ours(model, inputs, new_tokens: int, size: int | None = None) -> list[list[int]]:
    answers = LiveAnswerer(model, Tokens()).answer(inputs, Generation(new_tokens), batch_size=size)
    return [[int(token) for token in answer.text.split()] for answer in answers]


@torch.inference_mode()
def matmul_floor(model, batches, new_tokens: int = 1) -> None:
    """Run the matrix products of prompts and of every further token, with the LM head for last tokens only."""
    linear = [module.weight for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    for batch in batches:
        rows = len(batch)
        for step in range(new_tokens):
            tokens = rows if step else sum(map(len, batch))
            for weight in linear:
                torch.mm(torch.ones(tokens, weight.shape[1]), weight.T)
            torch.mm(torch.ones(rows, model.lm_head.in_features), model.lm_head.weight.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build()
    model.generation_config.eos_token_id = None  # random weights: no answer ends by itself
    alone, instructed = prompts(PROMPTS, 0), prompts(PROMPTS, INSTRUCTION)
    few = alone[:BATCH]
    assert ours(model, few, 4) == plain(model, few, 4) and ours(model, instructed, 1) == plain(model, instructed, 1)

    one = median_seconds(
        args.repeats,
        lambda: plain(model, alone, 1), lambda: ours(model, alone, 1), lambda: matmul_floor(model, [[prompt] for prompt in alone]),
        lambda: plain(model, instructed, 1), lambda: ours(model, instructed, 1),
    )  # fmt: skip
    long = median_seconds(
        args.repeats,
        lambda: plain(model, few, NEW),
        lambda: ours(model, few, NEW, BATCH),
        lambda: matmul_floor(model, [few], NEW),
    )
    result = {
        "one token, samples/s, plain": PROMPTS / one[0],
        "one token, ours / plain, nothing shared": one[0] / one[1],
        "one token, ours / plain, instruction shared": one[3] / one[4],
        "one token, matmul floor / plain": one[0] / one[2],
        f"{NEW} tokens, tokens/s, plain": BATCH * NEW / long[0],
        f"{NEW} tokens, ours at batch {BATCH} / plain": long[0] / long[1],
        f"{NEW} tokens, matmul floor at batch {BATCH} / plain": long[0] / long[2],
        "threads": args.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    show(result)
    keep(result, args.out)


if __name__ == "__main__":
    main()
