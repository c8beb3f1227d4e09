"""Answer prompts in words, with the loaded model or with an engine in its place. Tasks see no difference.

An answerer also holds the loaded model and its tokenizer, of which tasks take likelihoods and perplexities.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.batching import run_halving
from austeer.errors import AUSteerError
from eval.answering.answer_file import Answer, AnswerFile


@dataclass(frozen=True)
class Generation:
    """Say how every prompt of a call is answered."""

    new_tokens: int
    stop: str | None = None  # a pattern: an answer ends after its first match
    options: tuple[tuple[int, ...], ...] = ()  # for each option the first tokens of its spellings


class Answerer(ABC):
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @abstractmethod
    def batches(
        self, prompts: Sequence[str], generation: Generation, batch_size: int | None
    ) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
        """Return which prompts run together, by their indices, and a function that answers such a batch."""

    def answer(
        self,
        prompts: Sequence[str],
        generation: Generation,
        *,
        batch_size: int | None = None,
        file: AnswerFile | None = None,
        progress: str | None = None,
    ) -> list[Answer]:
        """Return the answer to each prompt.

        batch_size: 1 is the authors' way. file: keeps answers as they come, and those it has are not computed again.
        progress: shows a bar with this title.
        """
        answers = {} if file is None else file.read(prompts)
        batches, run = self.batches(prompts, generation, batch_size)
        todo = [batch for batch in batches if not all(index in answers for index in batch)]
        done = len(prompts) - sum(map(len, todo))
        with tqdm(
            total=len(prompts),
            initial=done,
            desc=progress,
            unit=" samples",
            smoothing=0.1,
            disable=True if progress is None else None,
        ) as bar:
            for batch, new in run_halving(todo, run, "prompts", bar.write, "use 4-bit, or a larger GPU"):
                both = zip(batch, new, strict=True)
                fresh = {index: answer for index, answer in both if index not in answers}
                answers.update(fresh)
                if file is not None:
                    file.append(fresh)
                bar.update(len(batch))
        ordered = [answers[index] for index in range(len(prompts))]
        if file is not None:
            file.finish(ordered)
        return ordered


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> list[list[int]]:
    """Return token ids. A prompt too long for the context loses its start (never a leading BOS), as pairs do."""
    cut = []
    for index, ids in enumerate(tokenizer(list(prompts), verbose=False)["input_ids"]):
        if not ids:
            raise AUSteerError(f"prompt {index} has no tokens: {prompts[index][:40]!r}")
        lead = int(ids[0] in tokenizer.all_special_ids)
        cut.append(ids[:lead] + ids[lead + max(0, len(ids) - longest) :])
    return cut


def option_tokens(
    tokenizer: PreTrainedTokenizerBase, options: Sequence[str], prompt: str
) -> tuple[tuple[int, ...], ...]:
    """Return for each option the tokens that its spellings begin with after such a prompt.

    Spellings are in both cases, with and without a space. A token that two options share is left out.
    """
    end = prompt[-20:]
    before = tokenizer(end)["input_ids"]
    firsts = []
    for option in options:
        word = option.strip()
        spellings = {space + text for space in ("", " ") for text in (word, word.lower(), word.capitalize())}
        after = (tokenizer(end + spelling)["input_ids"] for spelling in sorted(spellings))
        # a spelling that merges with the prompt's last token is not what the model would write
        firsts.append({ids[len(before)] for ids in after if ids[: len(before)] == before and len(ids) > len(before)})
    shared = {token for a in firsts for b in firsts if a is not b for token in a & b}
    own = tuple(tuple(sorted(tokens - shared)) for tokens in firsts)
    if not all(own):
        raise AUSteerError(f"the options {', '.join(map(repr, options))} begin with the same tokens in this tokenizer")
    return own


def up_to(text: str, stop: str) -> str:
    """Return the text to the end of the first match."""
    match = re.search(stop, text)
    return text[: match.end()] if match else text
