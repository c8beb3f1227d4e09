"""Run pairs and prompts in batches of similar size, and halve a batch that does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from austeer.errors import AUSteerError
from austeer.tokens import EncodedPair

T = TypeVar("T")

# How many tokens run at once, both texts of a pair counted. On a CPU, one prompt of ordinary length at a time keeps
# memory small; 8 pairs at once are a fifth faster and take several times the memory (benchmarks/core.py).
TOKENS_AT_ONCE = {"cpu": 160, "cuda": 8192, "mps": 8192}


def pair_batches(
    pairs: Sequence[EncodedPair], device: torch.device, size: int | None = None
) -> list[list[EncodedPair]]:
    """Put pairs of similar length together, `size` at once or as many as the device's tokens allow.

    The longest come first, so that what does not fit in memory shows at once.
    """
    tokens = TOKENS_AT_ONCE.get(device.type, 8192)

    def fits(batch: list[EncodedPair]) -> bool:
        # a batch is padded to its longest prompt and its longest tail, of which every pair has two
        padded = max(len(pair.prefix) for pair in batch) + 2 * max(pair.tail for pair in batch)
        room = len(batch) <= size if size else len(batch) * padded <= tokens
        # never mixed: beside prompts, a pair without one would be a row of padding, which has no attention
        return room and bool(batch[0].prefix) == bool(batch[-1].prefix)

    return grouped(sorted(pairs, key=lambda pair: (bool(pair.prefix), pair.cost), reverse=True), fits)


def grouped(items: Iterable[T], fits: Callable[[list[T]], bool]) -> list[list[T]]:
    """Put neighbours together as long as their batch fits; one alone always does."""
    batches: list[list[T]] = []
    for item in items:
        if batches and fits([*batches[-1], item]):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def run_halving(
    batches: Sequence[list[T]], run: Callable[[list[T]], Any], what: str, say: Callable[[str], object], remedy: str
) -> Iterator[tuple[list[T], Any]]:
    """Yield each batch with `run(batch)`. One that does not fit in memory is halved, and so are all that follow.

    what: the things in a batch, in the plural. say: called with a note to the user. remedy: advice for when one alone does not fit.
    """
    queue = list(batches)[::-1]
    while queue:
        batch = queue.pop()
        try:
            result = run(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise AUSteerError(f"out of memory with a single {what.removesuffix('s')}; {remedy}") from error
            half = (len(batch) + 1) // 2
            queue = [b[i : i + half] for b in [batch, *queue[::-1]] for i in range(0, len(b), half)][::-1]
            say(f"out of memory with {len(batch)} {what} at once; going on with {half}")
        else:
            yield batch, result
            continue
        if torch.cuda.is_available():  # outside the except: the error's traceback would keep tensors alive
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
