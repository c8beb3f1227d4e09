"""Read the answers of a task's items, whose fields are named differently from task to task."""

from __future__ import annotations

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from experiments.bench import Bench

RIGHT, WRONG = ("right", "gold", "positive"), ("wrong", "negative")


def right_answer(item: object) -> str:
    return _first(item, RIGHT)


def wrong_answer(item: object) -> str:
    """Return the wrong answer, or "" if the item has none."""
    return _first(item, WRONG)


def _first(item: object, names: tuple[str, ...]) -> str:
    return next((answer for name in names if (answer := getattr(item, name, ""))), "")


def held_out_pairs(bench: Bench, n: int) -> list[Pair]:
    """Return the first n validation items as pairs, which no ranking has seen."""
    pairs = [Pair(item.prompt, right_answer(item), wrong_answer(item)) for item in bench.task.validation[:n]]
    if not all(pair.positive and pair.negative for pair in pairs):
        raise AUSteerError(
            f"{bench.task.name}: its validation items have no wrong answers to compare the right ones with"
        )
    return pairs
