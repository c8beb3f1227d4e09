"""Neutral text: passages that have nothing to do with a task, on which the cost of steering is measured.

All passages have one length. The first half of a passage counts as its prompt, and costs are means over the second half:
some methods steer only from the end of a prompt on, and all are measured alike. One part of the passages serves to choose
AUs by, another to price plans, a third to measure and correct them, and a fourth to report what they cost on text that
nothing was fitted to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.files import read_text

LENGTH = 64  # tokens of a passage
TOKENS = {"choose": 6144, "price": 7680, "measure": 4096, "report": 4096}  # of each part, at least
MOST_UNKNOWN = 0.1  # of a text's tokens: beyond, its costs would be those of <unk>
PROSE = Path(__file__).with_name("prose.txt")
# not the test part, on which `python main.py restore` measures perplexity
WIKITEXT = tuple(f"{folder}/wiki.valid.raw" for folder in ("wikitext2", "wikitext-2", "wikitext-2-raw-v1"))


@dataclass(frozen=True)
class NeutralText:
    name: str
    passages: Tensor  # (passages, tokens), in random order

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.passages.to(torch.int32).numpy().tobytes()).hexdigest()

    def part(self, name: str) -> Tensor:
        """Return the passages to "choose" by, to "price" by, to "measure" on, or to "report" on."""
        shares = [len(self.passages) * tokens // sum(TOKENS.values()) for tokens in TOKENS.values()]
        return dict(zip(TOKENS, self.passages[: sum(shares)].split(shares), strict=True))[name]


def neutral_text(
    tokenizer: PreTrainedTokenizerBase, source: str | Path | None = None, data_dir: str | Path | None = None
) -> NeutralText:
    """Cut passages out of a text file: the given one, or WikiText-2 if it is in `data_dir`, or the prose shipped with this project."""
    found = [Path(data_dir) / name for name in WIKITEXT if (Path(data_dir) / name).exists()] if data_dir else []
    path = Path(source) if source else found[0] if found else PROSE
    name = path.name if source else "WikiText-2" if found else "the project's prose"
    lead = lead_of(tokenizer)
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > MOST_UNKNOWN * len(ids):
        raise AUSteerError(
            f"{unknown} of {len(ids)} tokens of {name} are unknown to this model's tokenizer: "
            "name a text that it can read by --neutral"
        )
    own = LENGTH - len(lead)
    passages = [lead + ids[start : start + own] for start in range(0, len(ids) - own + 1, own)]
    return from_passages(name, passages, LENGTH)


def from_passages(name: str, passages: Iterable[list[int]], length: int, times: int = 1) -> NeutralText:
    """Make neutral text of token sequences, each cut to `length`; shorter ones are left out.

    times: take so many times as much as is needed, where text is cheap.
    """
    whole = [ids[:length] for ids in passages if len(ids) >= length]
    needed = times * sum(TOKENS.values()) // length
    if len(whole) < needed:
        raise AUSteerError(
            f"the neutral text {name} is too short: it gives {len(whole)} passages of {length} tokens, and {needed} are "
            "needed; name a longer file by --neutral"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:needed]
    return NeutralText(name, torch.tensor([whole[index] for index in order.tolist()]))


def lead_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before every text: a BOS, or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: full.index(plain[0])] if plain and plain[0] in full else []
