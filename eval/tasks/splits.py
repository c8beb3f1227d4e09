"""Split the rows of a dataset into those to rank by, to choose by, and to test on.

clean: rows that share their text (or their passage, their options: the task's `group`) stay on one side, and nothing of
the test split is in training. paper: rank on the first thousand rows, as they come; what follows them is kept to choose
by, which the authors did on the test split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

PAIRS, VALIDATION = 1000, 500
HELD_OUT = 0.2  # the share of a small training file that is held out for validation


@dataclass(frozen=True)
class Split:
    ranking: list[dict]
    pool: list[dict]  # whose answers may serve as wrong ones
    validation: list[dict]
    test: list[dict]
    dropped: dict[str, int]  # training rows, by reason


def split(
    train: Sequence[dict],
    test: Sequence[dict],
    protocol: str,
    text: Callable[[dict], str],
    group: Callable[[dict], str],
) -> Split:
    if protocol == "paper":
        return Split(list(train[:PAIRS]), list(train), list(train[PAIRS : PAIRS + VALIDATION]), list(test), {})
    tested_groups, tested_texts = {group(row) for row in test}, {text(row) for row in test}
    apart = [row for row in train if group(row) not in tested_groups and text(row) not in tested_texts]
    once = list({text(row): row for row in reversed(apart)}.values())[::-1]
    enough = min(VALIDATION, max(round(HELD_OUT * len(once)), len(once) - PAIRS))
    validation: set[str] = set()
    held, sizes = 0, Counter(map(group, once))
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if held >= enough:
            break
        validation.add(name)
        held += sizes[name]
    ranking = [row for row in once if group(row) not in validation][:PAIRS]
    chosen_by = [row for row in once if group(row) in validation]
    dropped = {
        "shares its text with the test split": len(train) - len(apart),
        "a repeated text": len(apart) - len(once),
    }
    return Split(ranking, ranking, chosen_by, list(test), dropped)


def drawn(groups: Sequence[str], n: int, seed: int) -> list[int]:
    """Draw n pairs at random, given the group of each, and return their indices, in order.

    Groups are drawn whole. One that is larger than the room left is passed over, so the draw may be a few pairs short.
    """
    sizes, names, taken = Counter(groups), sorted(set(groups)), set()
    Random(seed).shuffle(names)
    for name in names:
        if sizes[name] <= n:
            taken.add(name)
            n -= sizes[name]
    return [index for index, name in enumerate(groups) if name in taken]
