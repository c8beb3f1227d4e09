"""Greedy answers of a model, steered or not: prompts in, answers out.

Prompts of like length run together, padded on the left, so that the last column of a batch is the last
token of every prompt. A batch of one is not padded at all and computes what `generate` computes: the
authors' way. How prompts fall into batches depends only on the prompts, so a killed run that goes on
computes the very numbers of an unbroken one, and so do several processes that share the batches.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer import processes as shared_work
from austeer.errors import AUSteerError
from austeer.forward import input_device
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.decoding_cache import DecodingCache

# numbers of a hidden state at once (tokens, with padding and room for answers, times width). Prompts alone run
# best in pieces that fit a CPU's cache; token by token, every row more shares one reading of the weights.
BATCH_NUMBERS = {"cpu": (2**19, 2**22), "cuda": (2**27, 2**27)}
# last tokens of a prompt that are never shared: steering of "before-last-2" treats the last two by themselves
OWN = 2
ENGINE_BATCH = 1024  # prompts that an engine is given at once: what a killed run loses
CHECK_EVERY = 8  # new tokens between two looks at which answers have ended: a look makes a GPU wait


@dataclass(frozen=True)
class Question:
    """What is asked of every prompt alike."""

    new_tokens: int
    stop: str | None = None  # a pattern: an answer ends behind its first match
    options: tuple[tuple[int, ...], ...] = ()  # for each option the first tokens of its spellings


class Engine(ABC):
    """Speaks in a model's place; whatever else a task asks, it does as the model."""

    @abstractmethod
    def speak(self, prompts: Sequence[str], which: Sequence[int], question: Question) -> list[Answer]:
        """The answers to these of the prompts. How they run together is the engine's own business."""


def answers(
    model: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    question: Question,
    *,
    batch_size: int | None = None,
    file: AnswerFile | None = None,
    progress: str | None = None,
    rows: Callable[[list[int]], object] | None = None,
) -> list[Answer]:
    """The answer to each prompt. batch_size=1 is the authors' way; `file` keeps what was answered before.

    rows: told, whenever they change, which prompts the rows of a batch are, so that each may be steered by its own.
    """
    found = {} if file is None else file.read(prompts)
    if isinstance(model, Engine):
        batches, answered = _by_engine(model, prompts, question)
    else:
        batches, answered = _by_model(model, tokenizer, prompts, question, batch_size, rows)
    todo = [batch for batch in batches if not all(i in found for i in batch)]
    with tqdm(total=len(prompts), initial=len(prompts) - sum(map(len, todo)), desc=progress, unit=" samples",
              disable=True if progress is None or not shared_work.is_first() else None, smoothing=0.1) as bar:  # fmt: skip
        mine = answered(shared_work.share(todo), bar)
        for batch, new in shared_work.merged((batch, [[a.text, a.options] for a in made]) for batch, made in mine):
            both = zip(batch, new, strict=True)
            fresh = {index: Answer(text, tuple(options)) for index, (text, options) in both if index not in found}
            found.update(fresh)
            if file is not None:
                file.append(fresh)
            bar.update(len(batch))
    ordered = [found[index] for index in range(len(prompts))]
    if file is not None:
        file.finish(ordered)
    return ordered


def _by_engine(engine: Engine, prompts, question) -> tuple[list[list[int]], Callable]:
    order = list(range(len(prompts)))
    batches = [order[start : start + ENGINE_BATCH] for start in range(0, len(order), ENGINE_BATCH)]
    return batches, lambda todo, bar: ((batch, engine.speak(prompts, batch, question)) for batch in todo)


def _by_model(model, tokenizer, prompts, question, batch_size, rows) -> tuple[list[list[int]], Callable]:
    ids = encode_prompts(tokenizer, prompts, _longest_prompt(model, question))
    alone = batch_size == 1 or rows is not None  # what rows share by their words may still be steered differently
    beginning = _Beginning(model, [] if alone else ids[0][: _shared(ids, question, model)])
    batches = _batches(ids, question, model, batch_size)
    return batches, lambda todo, bar: _answered(model, tokenizer, ids, todo, question, beginning, bar, rows)


def option_tokens(
    tokenizer: PreTrainedTokenizerBase, options: Sequence[str], prompt: str
) -> tuple[tuple[int, ...], ...]:
    """For each option the tokens its spellings begin with behind such a prompt: both cases, with and without
    a space. A token that two options share tells nothing and is left out."""
    end = prompt[-20:]
    before = tokenizer(end)["input_ids"]
    firsts = []
    for option in options:
        word = option.strip()
        spellings = {space + text for space in ("", " ") for text in (word, word.lower(), word.capitalize())}
        after = (tokenizer(end + spelling)["input_ids"] for spelling in sorted(spellings))
        # a spelling that melts into the prompt's last token is not what the model is asked for
        firsts.append({ids[len(before)] for ids in after if ids[: len(before)] == before and len(ids) > len(before)})
    shared = {token for a in firsts for b in firsts if a is not b for token in a & b}
    own = tuple(tuple(sorted(tokens - shared)) for tokens in firsts)
    if not all(own):
        raise AUSteerError(f"the options {', '.join(map(repr, options))} begin with the same tokens in this tokenizer")
    return own


def chat_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[str]:
    """Prompts as a user's turn in the model's own chat format, without the BOS that tokenizing adds again."""
    if not getattr(tokenizer, "chat_template", None):
        raise AUSteerError("this tokenizer has no chat template; leave --chat out, or use an instruction-tuned model")
    made = []
    for prompt in prompts:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )  # answers, not thoughts, fit the tasks' few tokens; templates without thinking ignore it
        adds_bos = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        made.append(text.removeprefix(tokenizer.bos_token) if adds_bos else text)
    return made


def _longest_prompt(model: PreTrainedModel, question: Question) -> int:
    room = model.config.max_position_embeddings - question.new_tokens
    if room < 1:
        raise AUSteerError(
            f"{question.new_tokens} new tokens do not fit into a context of {model.config.max_position_embeddings}"
        )
    return room


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids. A prompt too long for the context loses its start (never a leading BOS), as pairs do."""
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    cut = []
    for index, ids in enumerate(encoded):
        if not ids:
            raise AUSteerError(f"prompt {index} has no tokens: {prompts[index][:40]!r}")
        lead = int(ids[0] in tokenizer.all_special_ids)
        excess = max(0, len(ids) - longest)
        cut.append(ids[:lead] + ids[lead + excess :])
    return cut


def _batches(
    ids: Sequence[Sequence[int]], question: Question, model: PreTrainedModel, size: int | None
) -> list[list[int]]:
    """Indices of prompts that run together. Longest first: what does not fit in memory shows at once."""
    numbers = BATCH_NUMBERS.get(input_device(model).type, BATCH_NUMBERS["cuda"])[question.new_tokens > 1]
    tokens = numbers // model.config.hidden_size
    made: list[list[int]] = []
    for index in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
        room = False
        if made:
            longest = len(ids[made[-1][0]]) + question.new_tokens
            room = len(made[-1]) < size if size else (len(made[-1]) + 1) * longest <= tokens
        if room:
            made[-1].append(index)
        else:
            made.append([index])
    return made


def _answered(model, tokenizer, ids, todo, question, beginning, bar, rows) -> Iterable[tuple[list[int], list[Answer]]]:
    """Each batch with its answers; a batch too large for the memory is halved, and all that follow."""
    queue = todo[::-1]
    while queue:
        batch = queue.pop()
        try:
            done = _batch(model, tokenizer, batch, ids, question, beginning, rows)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise AUSteerError("out of memory with a single prompt; use 4-bit, or a larger GPU") from error
            half = (len(batch) + 1) // 2
            queue = [b[i : i + half] for b in [batch, *queue[::-1]] for i in range(0, len(b), half)][::-1]
            bar.write(f"out of memory with {len(batch)} prompts at once; going on with {half}")
        else:
            yield batch, done
            continue
        torch.cuda.empty_cache()  # outside the except: the error's traceback would keep tensors alive


def _shared(ids: Sequence[Sequence[int]], question: Question, model: PreTrainedModel) -> int:
    """How many tokens all prompts begin with, such as the task's instruction; each keeps `OWN` of its own.

    Padding comes behind them, which a sliding window would count as distance: then nothing is shared.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and max(map(len, ids)) + question.new_tokens > window:
        return 0
    first, last = min(ids), max(ids)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return max(0, min(same, min(map(len, ids)) - OWN))


class _Beginning:
    """What all prompts begin with, run once, when the first batch asks for it."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]):
        self.model, self.ids = model, list(ids)
        self.cache: DecodingCache | None = None

    def run(self) -> DecodingCache | None:
        if self.ids and self.cache is None:
            length = len(self.ids)
            self.cache = DecodingCache(self.model.config, length, prompt_end=length + OWN)
            tokens = torch.tensor([self.ids], device=input_device(self.model))
            self.model.base_model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        return self.cache


class _Decoding:
    """A batch under way: its cache, its padding, and whether all its logits were finite."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], new_tokens: int, beginning: _Beginning):
        self.model, device = model, input_device(model)
        shared, longest = len(beginning.ids), max(map(len, rows))
        self.cache = DecodingCache(model.config, longest + new_tokens, longest, beginning.run())
        padded = [[0] * (longest - len(row)) + list(row[shared:]) for row in rows]
        self.tokens = torch.tensor(padded, device=device)
        columns = torch.arange(shared, longest, device=device)
        padding = torch.tensor([longest - len(row) for row in rows], device=device)[:, None]
        self.positions = columns - padding  # of padding: before the prompt's own first
        self.mask = None
        if bool(padding.any()):
            own = (self.positions >= shared).long()
            self.mask = torch.cat([own.new_ones(len(rows), shared), own], 1)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def step(self) -> Tensor:
        """Logits behind the tokens at hand, (rows, vocabulary)."""
        last = torch.tensor([self.tokens.shape[1] - 1], device=self.tokens.device)  # as a slice, it is no fast matmul
        out = self.model(
            input_ids=self.tokens, position_ids=self.positions.clamp(min=0), attention_mask=self.mask,
            past_key_values=self.cache, use_cache=True, logits_to_keep=last,
        )  # fmt: skip
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
    question: Question,
    beginning: _Beginning,
    rows: Callable[[list[int]], object] | None,
) -> list[Answer]:
    """Prompts together, then token by token; a row whose answer has ended leaves the batch."""
    if rows is not None:
        rows(batch)
    run = _Decoding(model, [ids[index] for index in batch], question.new_tokens, beginning)
    options = [()] * len(batch)
    logits = run.step()
    if question.options:
        logp = logits.float().log_softmax(-1).cpu()
        options = [tuple(float(row[list(own)].max()) for own in question.options) for row in logp]
    texts = [""] * len(batch)
    running, new = list(range(len(batch))), run.tokens
    while True:
        last = new.shape[1] == question.new_tokens
        if last or new.shape[1] % CHECK_EVERY == 0:
            run.check()
            read = [_read(model, tokenizer, row, question) for row in new.tolist()]
            for index, (text, _) in zip(running, read, strict=True):
                texts[index] = text
            going = [place for place, (_, ended) in enumerate(read) if not (ended or last)]
            if not going:
                return [Answer(*both) for both in zip(texts, options, strict=True)]
            if len(going) < len(running):
                running, new = [running[place] for place in going], new[going]
                run.keep(going)
                if rows is not None:
                    rows([batch[place] for place in running])
        run.step()
        new = torch.cat([new, run.tokens], 1)


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[int], question: Question
) -> tuple[str, bool]:
    """The text of new tokens up to where the answer ends, and whether it has ended."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    stopped = question.stop is not None and re.search(question.stop, text) is not None
    return (up_to(text, question.stop) if stopped else text), end is not None or stopped


def up_to(text: str, stop: str) -> str:
    """The text to the end of the first match."""
    found = re.search(stop, text)
    return text[: found.end()] if found else text
