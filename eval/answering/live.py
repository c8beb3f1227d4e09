"""Greedy answers of the loaded model, steered or not.

Prompts of similar length run together, padded on the left, so that the last column of a batch is the last token of every
prompt. A batch of one is not padded at all and computes what `generate` computes: the authors' way. How prompts fall
into batches depends only on the prompts, so a killed run that goes on computes the very numbers of an unbroken one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.batching import grouped
from austeer.errors import AUSteerError
from austeer.forward import input_device
from austeer.plan import Plan
from austeer.steering import steer
from austeer.tokens import common_length
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.answerer import Answerer, Generation, encode_prompts, up_to
from eval.answering.decoding_cache import DecodingCache
from rmodels import context_length, continues_on_caches, without_head

# Numbers of a hidden state at once (tokens, with padding and room for answers, times width). Prompts alone run
# best in pieces that fit a CPU's cache; token by token, every further row shares one reading of the weights.
BATCH_NUMBERS = {"cpu": (2**19, 2**22), "cuda": (2**27, 2**27)}
# The last tokens of a prompt are never shared: steering of "before-last-2" treats the last two by themselves.
OWN = 2
CHECK_EVERY = 8  # new tokens between two checks of which answers have ended: a check makes a GPU wait


class LiveAnswerer(Answerer):
    """Answer with the model itself.

    plans_of_rows: a plan for each prompt. Each row of a batch is then steered by its own, so that a whole grid of plans
    over the same few items runs together; token by token, a small batch costs nearly as much as a large one.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plans_of_rows: Sequence[Plan] | None = None
    ):
        super().__init__(model, tokenizer)
        self.plans_of_rows, self._steering = plans_of_rows, ExitStack()

    def answer(self, prompts, generation, *, batch_size=None, file: AnswerFile | None = None, progress=None):
        with self._steering:
            return super().answer(prompts, generation, batch_size=batch_size, file=file, progress=progress)

    def batches(
        self, prompts: Sequence[str], generation: Generation, batch_size: int | None
    ) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
        ids = encode_prompts(self.tokenizer, prompts, _longest_prompt(self.model, generation))
        if not continues_on_caches(self.model):
            return (
                _batches(ids, generation, self.model, batch_size, same_length=True),
                lambda batch: _generated(self.model, self.tokenizer, batch, ids, generation, self._steer_rows),
            )
        # prompts that begin alike may still be steered differently
        alone = batch_size == 1 or self.plans_of_rows is not None
        beginning = _Beginning(self.model, [] if alone else ids[0][: _shared(ids, generation, self.model)])
        return (
            _batches(ids, generation, self.model, batch_size),
            lambda batch: _batch(self.model, self.tokenizer, batch, ids, generation, beginning, self._steer_rows),
        )

    def _steer_rows(self, indices: list[int]) -> None:
        """Steer each row of the current batch by the plan of its prompt."""
        if self.plans_of_rows is not None:
            self._steering.close()
            self._steering.enter_context(steer(self.model, [self.plans_of_rows[index] for index in indices]))


def _longest_prompt(model: PreTrainedModel, generation: Generation) -> int:
    room = context_length(model) - generation.new_tokens
    if room < 1:
        raise AUSteerError(f"{generation.new_tokens} new tokens do not fit into {context_length(model)}")
    return room


def _batches(
    ids: Sequence[Sequence[int]],
    generation: Generation,
    model: PreTrainedModel,
    size: int | None,
    same_length: bool = False,
) -> list[list[int]]:
    """Return the indices of prompts that run together, the longest first: what does not fit in memory shows at once."""
    numbers = BATCH_NUMBERS.get(input_device(model).type, BATCH_NUMBERS["cuda"])[generation.new_tokens > 1]
    tokens = numbers // model.config.get_text_config(decoder=True).hidden_size

    def fits(batch: list[int]) -> bool:
        if same_length and len(ids[batch[0]]) != len(ids[batch[-1]]):
            return False
        longest = len(ids[batch[0]]) + generation.new_tokens
        return len(batch) <= size if size else len(batch) * longest <= tokens

    return grouped(sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)), fits)


def _shared(ids: Sequence[Sequence[int]], generation: Generation, model: PreTrainedModel) -> int:
    """Return how many tokens all prompts begin with, such as the task's instruction; each keeps `OWN` of its own.

    Padding comes after them. A sliding window would count it as distance, so where one is too short nothing is shared.
    """
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    if window is not None and max(map(len, ids)) + generation.new_tokens > window:
        return 0
    return max(0, min(common_length(min(ids), max(ids)), min(map(len, ids)) - OWN))


class _Beginning:
    """Run what all prompts begin with once, when the first batch needs it."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]):
        self.model, self.ids = model, list(ids)
        self.cache: DecodingCache | None = None

    def run(self) -> DecodingCache | None:
        if self.ids and self.cache is None:
            length = len(self.ids)
            self.cache = DecodingCache(self.model.config, length, prompt_end=length + OWN)
            tokens = torch.tensor([self.ids], device=input_device(self.model))
            without_head(self.model)(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        return self.cache


class _Decoding:
    """Hold a batch under way: its cache, its padding, and whether all its logits were finite."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], new_tokens: int, beginning: _Beginning):
        self.model, device = model, input_device(model)
        shared, longest = len(beginning.ids), max(map(len, rows))
        self.cache = DecodingCache(model.config, longest + new_tokens, longest, beginning.run())
        padded = [[0] * (longest - len(row)) + list(row[shared:]) for row in rows]
        self.tokens = torch.tensor(padded, device=device)
        columns = torch.arange(shared, longest, device=device)
        padding = torch.tensor([longest - len(row) for row in rows], device=device)[:, None]
        self.positions = columns - padding  # those of padding come before the prompt's first, below `shared`
        self.mask = None
        if bool(padding.any()):
            own = (self.positions >= shared).long()
            self.mask = torch.cat([own.new_ones(len(rows), shared), own], 1)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def step(self) -> Tensor:
        """Run the current tokens, and return the logits of the next, (rows, vocabulary)."""
        last = torch.tensor([self.tokens.shape[1] - 1], device=self.tokens.device)  # a slice slows the matmul
        out = self.model(
            input_ids=self.tokens,
            position_ids=self.positions.clamp(min=0),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits = out.logits[:, -1]
        largest, token = (value.to(self.tokens.device) for value in logits.max(-1, keepdim=True))
        self.finite &= torch.isfinite(largest).all()  # the largest is nan if any is, and inf if any is
        self.tokens = token
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return logits

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.tokens.device)
        self.cache.batch_select_indices(index)
        self.tokens, self.positions = self.tokens[index], self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]

    def check(self) -> None:
        if not bool(self.finite):
            raise AUSteerError("the model's logits are inf or nan: these answers are not scored")


@torch.inference_mode()
def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[int],
    ids: Sequence[Sequence[int]],
    generation: Generation,
    beginning: _Beginning,
    steer_rows: Callable[[list[int]], None],
) -> list[Answer]:
    """Run the prompts together, then token by token; a row whose answer has ended leaves the batch."""
    steer_rows(batch)
    run = _Decoding(model, [ids[index] for index in batch], generation.new_tokens, beginning)
    logits = run.step()
    options = _of_options(logits, generation)
    texts = [""] * len(batch)
    running, new = list(range(len(batch))), run.tokens
    while True:
        last = new.shape[1] == generation.new_tokens
        if last or new.shape[1] % CHECK_EVERY == 0:
            run.check()
            read = [_read(model, tokenizer, row, generation) for row in new.tolist()]
            for index, (text, _) in zip(running, read, strict=True):
                texts[index] = text
            going = [place for place, (_, ended) in enumerate(read) if not (ended or last)]
            if not going:
                return [Answer(*both) for both in zip(texts, options, strict=True)]
            if len(going) < len(running):
                running, new = [running[place] for place in going], new[going]
                run.keep(going)
                steer_rows([batch[place] for place in running])
        run.step()
        new = torch.cat([new, run.tokens], 1)


@torch.inference_mode()
def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[int],
    ids: Sequence[Sequence[int]],
    generation: Generation,
    steer_rows: Callable[[list[int]], None],
) -> list[Answer]:
    """Answer prompts of one length by the model's own `generate`: for recurrent layers, which cannot be padded."""
    steer_rows(batch)
    prompts = torch.tensor([ids[index] for index in batch], device=input_device(model))
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=generation.new_tokens,
        pad_token_id=tokenizer.pad_token_id or 0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    if not all(bool(torch.isfinite(logits.max(-1).values).all()) for logits in out.logits):
        raise AUSteerError("the model's logits are inf or nan: these answers are not scored")
    options = _of_options(out.logits[0], generation)
    new = out.sequences[:, prompts.shape[1] :].tolist()
    texts = [_read(model, tokenizer, row, generation)[0] for row in new]
    return [Answer(*both) for both in zip(texts, options, strict=True)]


def _of_options(logits: Tensor, generation: Generation) -> list[tuple[float, ...]]:
    """Return, for each row, the log-probability of every option, summed over its spellings."""
    if not generation.options:
        return [()] * len(logits)
    logp = logits.float().log_softmax(-1).cpu()
    return [*zip(*(logp[:, list(own)].logsumexp(1).tolist() for own in generation.options), strict=True)]


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[int], generation: Generation
) -> tuple[str, bool]:
    """Return the text of new tokens up to where the answer ends, and whether it has ended."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    stopped = generation.stop is not None and re.search(generation.stop, text) is not None
    return (up_to(text, generation.stop) if stopped else text), end is not None or stopped
