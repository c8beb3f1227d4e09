"""Sample several continuations of each prompt, by a model that may be steered: seeded and resumable.

Prompts of similar length run together, padded on the left. How they fall into batches depends on the prompts alone and each
batch has a seed of its own, so a killed run that goes on draws the very texts of an unbroken one. The frequency penalty
is OpenAI's: a token's logit loses `penalty` for each time the token occurs among the new ones. Tokens of the prompt and
of padding are not counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from austeer.batching import grouped
from austeer.errors import AUSteerError
from austeer.forward import input_device
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.answerer import encode_prompts
from rmodels import context_length, continues_on_caches

BATCH = 32


@dataclass(frozen=True)
class Sampling:
    """Set how continuations are sampled. The defaults are NeuroSteer's."""

    new_tokens: int = 50
    samples: int = 2  # of each prompt
    temperature: float = 0.9
    top_p: float = 0.3
    frequency_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.new_tokens < 1 or self.samples < 1:
            raise AUSteerError(
                "sampling needs at least one new token and one sample a prompt (--new-tokens, --samples)"
            )


class FrequencyPenalty(LogitsProcessor):
    """Lower the logits of repeated tokens. `generate` applies this before temperature and top-p."""

    def __init__(self, penalty: float, prompt_length: int):
        self.penalty, self.prompt_length = penalty, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.max(-1).values).all():  # sampling from nan would take the whole GPU down
            raise AUSteerError("the model's logits are inf or nan: lower alpha, or load it in bfloat16 or float32")
        new = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self.penalty * counts


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    how: Sampling,
    file: AnswerFile | None = None,
    progress: str | None = None,
) -> list[list[str]]:
    """Return the samples of each prompt. file: keeps them as they come; each sample is an item of it."""
    repeated = [prompt for prompt in prompts for _ in range(how.samples)]
    answers = {} if file is None else file.read(repeated)
    ids = _encode(tokenizer, repeated, context_length(model) - how.new_tokens)
    # longest first: too little memory shows at once
    order = sorted(range(len(repeated)), key=lambda i: (-len(ids[i]), i))
    can_pad = continues_on_caches(model)

    def fits(batch: list[int]) -> bool:
        return len(batch) <= BATCH and (can_pad or len(ids[batch[0]]) == len(ids[batch[-1]]))

    place = {i: start for start, i in enumerate(order)}
    for batch in tqdm(grouped(order, fits), desc=progress, unit=" batches", disable=progress is None):
        if all(i in answers for i in batch):
            continue
        start = place[batch[0]]
        texts = _batch(model, tokenizer, [ids[i] for i in batch], how, zlib.crc32(f"{how.seed} {start}".encode()))
        fresh = dict(zip(batch, map(Answer, texts), strict=True))
        answers.update(fresh)
        if file is not None:
            file.append(fresh)
    ordered = [answers[i] for i in range(len(repeated))]
    if file is not None:
        file.finish(ordered)
    return [[answer.text for answer in ordered[i : i + how.samples]] for i in range(0, len(ordered), how.samples)]


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> list[list[int]]:
    if longest < 2:
        raise AUSteerError("so many new tokens do not fit into the model's context; lower --new-tokens")
    return encode_prompts(tokenizer, prompts, longest)


@torch.inference_mode()
def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], how: Sampling, seed: int
) -> list[str]:
    width, device = max(map(len, rows)), input_device(model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # 32 bits, since the CPU's generator ignores any higher ones
        out = model.generate(
            ids,
            attention_mask=own,
            do_sample=True,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=0,
            repetition_penalty=1.0,  # else the checkpoint's own defaults would be used
            max_new_tokens=how.new_tokens,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([FrequencyPenalty(how.frequency_penalty, width)]),
        )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
