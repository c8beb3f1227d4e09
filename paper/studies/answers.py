"""Read the answers of a task's items, whose fields are named differently from task to task."""

from __future__ import annotations

RIGHT, WRONG = ("right", "gold", "positive"), ("wrong", "negative")


def right_answer(item: object) -> str:
    return _first(item, RIGHT)


def wrong_answer(item: object) -> str:
    """Return the wrong answer, or "" if the item has none."""
    return _first(item, WRONG)


def _first(item: object, names: tuple[str, ...]) -> str:
    return next((answer for name in names if (answer := getattr(item, name, ""))), "")
