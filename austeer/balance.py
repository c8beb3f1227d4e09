"""Effects without bias: an AU counts only if it helps whichever answer is right.

Where all pairs share a few answers, such as yes and no, an AU that only says yes more often has a large mean effect as
soon as more pairs are right with yes. So the mean is taken for each right answer alone. An AU keeps an effect only where
all these means have one sign: the mean of them, in which every answer weighs the same, whatever its number of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from austeer.temperature import PAIRS_PER_ANSWER, shared_answers


def answer_numbers(pairs: Sequence[Pair]) -> Tensor:
    """Return the numbers of each pair's right and wrong answer, (pairs, 2)."""
    texts = shared_answers(pairs)
    fewest = min(Counter(pair.positive for pair in pairs).values())
    if len(texts) < 2 or fewest < PAIRS_PER_ANSWER:
        raise AUSteerError(
            "balancing needs a few answers that all pairs share, such as yes and no, each of them right in at least "
            f"{PAIRS_PER_ANSWER} pairs: leave it out for these pairs"
        )
    index = {text: number for number, text in enumerate(texts)}
    return torch.tensor([[index[pair.positive], index[pair.negative]] for pair in pairs])


def balanced(effects: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the balanced mean effect of every AU and its standard error, float64.

    effects: (pairs, ...). right: the number of each pair's right answer.
    """
    means, variances = [], []
    for answer in right.unique():
        of_answer = effects[(right == answer).to(effects.device)].double()
        n = len(of_answer)
        means.append(of_answer.mean(0))
        variances.append((of_answer - means[-1]).square().sum(0) / max(1, n - 1) / n)
    by_answer = torch.stack(means)
    agree = (by_answer > 0).all(0) | (by_answer < 0).all(0)
    error = torch.stack(variances).sum(0).sqrt() / len(means)
    return torch.where(agree, by_answer.mean(0), 0.0), error
