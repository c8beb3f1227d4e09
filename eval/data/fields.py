"""Take the fields of a raw row, checked: what a task's `read_row` is made of. Errors name the field; the reader of the file adds the line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from austeer.errors import AUSteerError

LIMIT = 5_000_000  # characters of one text, bytes of one line: no data set here has more


def pick(row: dict, names: Sequence[str]) -> object:
    """Return the first of these fields that is there."""
    for name in names:
        if name in row:
            return row[name]
    there = ", ".join(" ".join(str(name)[:30].split()) for name in list(row)[:12]) or "none"
    raise AUSteerError(f"no {' or '.join(names)} (fields there: {there})")


def text(row: dict, *names: str, empty: bool = False) -> str:
    value = pick(row, names)
    if not isinstance(value, str):
        raise AUSteerError(f"{names[0]} is {type(value).__name__}, not text")
    if len(value) > LIMIT:
        raise AUSteerError(f"{names[0]} is over {LIMIT // 10**6} MB long; this is not a row of a data set")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a character, which no file and no tokenizer can
        raise AUSteerError(f"{names[0]} holds half a character (a lone surrogate)") from None
    if not empty and not value.strip():
        raise AUSteerError(f"{names[0]} is empty")
    return value


def texts(row: dict, *names: str) -> dict[str, str]:
    return {name: text(row, name) for name in names}


def steps(row: dict, *names: str) -> str:
    """Return the text of a solution that ends in its number."""
    solution = text(row, *names)
    if "####" not in solution:
        raise AUSteerError(f"{names[0]} does not end in '#### number': {solution[-40:]!r}")
    return solution


def number(row: dict, *names: str) -> float:
    value = pick(row, names)
    try:
        size = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        size = math.nan
    if not math.isfinite(size):
        raise AUSteerError(f"{names[0]} is {str(value)[:40]!r}, not a number")
    return size


def truth(row: dict, *names: str) -> bool:
    value = pick(row, names)
    if not isinstance(value, bool):
        raise AUSteerError(f"{names[0]} is {str(value)[:40]!r}; it must be true or false")
    return value


def label(row: dict, name: str, *allowed: int | str) -> int | str:
    value = pick(row, (name,))
    for one in allowed:
        if str(value).strip() == str(one):  # CSV holds "1" where JSON holds 1
            return one
    raise AUSteerError(f"{name} is {str(value)[:40]!r}; it must be {' or '.join(map(str, allowed))}")
