"""Many plans in one batch: the same few items under every plan of a grid, each row steered by its own.

Token by token, a small batch costs nearly as much as a large one, and a search asks for the same few items again and
again: for answers of several tokens this pays up to `FEW` items, for answers of one token it does not
(benchmarks/search.py measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from austeer.plan import Plan
from austeer.steering import steer

FEW = 25


@contextmanager
def steered_rows(model: PreTrainedModel, plans: Sequence[Plan], items: int) -> Iterator[Callable[[list[int]], None]]:
    """For answers to `items` items under the first plan, then under the second, ...: what to tell which rows are asked."""
    with ExitStack() as steered:

        def rows(indices: list[int]) -> None:
            steered.close()
            steered.enter_context(steer(model, [plans[index // items] for index in indices]))

        yield rows
