"""Few-shot prompting: right examples in front of every prompt. Nothing is steered.

    prompt and right answer of a pair, a blank line, the next pair's, a blank line, ..., the prompt itself

The examples are drawn at random from the pairs that all methods learn from. All prompts of a draw get the same ones, and
the 4 examples are the first of the 8, and these of the 16. Where a prompt leaves no room for all of them in the model's
context, the last ones are dropped until it fits; this is said, and the record counts the prompts. Room is kept for an
answer as long as the longest right one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from austeer.evidence import Evidence
from austeer.methods.base import PROMPT, GridPoint, Method, every_kind
from austeer.pairs import Pair
from rmodels import context_length


@dataclass
class Examples:
    pairs: list[Pair]
    tokenizer: PreTrainedTokenizerBase
    room: int  # tokens that a prompt may have

    def fits(self, prompt: str) -> bool:
        return len(self.tokenizer(prompt, verbose=False)["input_ids"]) <= self.room


class FewShot(Method):
    name, label, draws = "few-shot", "few-shot prompts", True
    paper = "Brown et al., arXiv 2005.14165"
    edits = "prompts, by right examples"
    sites = (PROMPT,)
    scalable = foldable = False  # prompts are no plan
    axes = every_kind(examples=(4, 8, 16))

    def prepare(self, evidence: Evidence) -> Examples:
        answers = evidence.tokenizer([pair.positive for pair in evidence.pairs], verbose=False)["input_ids"]
        room = context_length(evidence.model) - max(map(len, answers))
        return Examples(evidence.pairs, evidence.tokenizer, room)

    def plan(self, prepared: Examples, point: GridPoint, draw: int = 0) -> None:
        return None

    def asked(
        self, prepared: Examples, point: GridPoint, items: Sequence, draw: int = 0
    ) -> tuple[list, dict[str, int]]:
        number = min(int(point["examples"]), len(prepared.pairs))
        order = random.Random(draw).sample(prepared.pairs, len(prepared.pairs))
        shown = [f"{pair.prompt}{pair.positive}\n\n" for pair in order[:number]]
        prompts = ["".join(shown) + item.prompt for item in items]
        long = too_long = [place for place in range(len(items)) if not prepared.fits(prompts[place])]
        while too_long and shown:
            shown.pop()
            for place in too_long:
                prompts[place] = "".join(shown) + items[place].prompt
            too_long = [place for place in too_long if not prepared.fits(prompts[place])]
        if long:
            tqdm.write(
                f"few-shot: {number} examples do not fit into the context with {len(long)} of {len(items)} prompts, which "
                "get fewer",
                file=sys.stderr,
            )
        with_examples = [with_prompt(item, prompt) for item, prompt in zip(items, prompts, strict=True)]
        return with_examples, {"examples": number, "prompts with fewer": len(long)}


def with_prompt(item, prompt: str):
    return item._replace(prompt=prompt) if isinstance(item, tuple) else replace(item, prompt=prompt)


METHODS = (FewShot(),)
