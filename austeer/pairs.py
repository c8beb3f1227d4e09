"""Contrastive pairs: a prompt, a right answer and a wrong one. Every method learns from such pairs.

A file of pairs is JSON Lines of {"prompt", "positive", "negative"} (or of the authors' [prompt, right, wrong] triples,
also as one JSON array), or CSV with those three columns. Prompt and answer are joined without a space, so an answer
that should follow a space begins with one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from austeer.errors import AUSteerError
from austeer.files import read_json_lines, read_text, write_json_lines

FIELDS = ("prompt", "positive", "negative")


class Pair(NamedTuple):
    prompt: str
    positive: str
    negative: str


def read_pairs(path: str | Path, fields: Sequence[str] = FIELDS, check: bool = True) -> list[Pair]:
    """Read a file of pairs; `fields` names its columns for prompt, positive and negative.

    check=False lets empty and equal answers pass, as the authors' code does.
    """
    rows = _read(Path(path), fields)
    if not rows:
        raise AUSteerError(f'{path} holds no pairs; write lines: {{"prompt": ..., "positive": ..., "negative": ...}}')
    pairs = [Pair(*row) for _, row in rows]
    if check:
        check_pairs(pairs, [f"{path}, line {line}" for line, _ in rows])
    return pairs


def read_columns(path: str | Path, fields: Sequence[str]) -> list[tuple[str, ...]]:
    """Read these fields of each row of a user's table, as text."""
    rows = _read(Path(path), fields)
    if not rows:
        raise AUSteerError(f"{path} holds no rows")
    return [tuple(map(str, row)) for _, row in rows]


def _read(path: Path, fields: Sequence[str]) -> list[tuple[int, Sequence]]:
    text = read_text(path)
    return list(_csv_rows(text, path, fields) if path.suffix.lower() == ".csv" else _json_rows(text, path, fields))


def check_pairs(pairs: Sequence[Pair], where: Sequence[str] | None = None) -> None:
    """Refuse empty answers and equal answers: nothing can be learned from them, and usually the file is broken."""
    if not pairs:
        raise AUSteerError("no pairs given; ranking needs at least one")
    for index, pair in enumerate(pairs):
        place = where[index] if where else f"pair {index}"
        for field, value in zip(FIELDS, pair, strict=True):
            if not isinstance(value, str):
                raise AUSteerError(f"{place}: {field} is {type(value).__name__}, not text")
            if not value:
                raise AUSteerError(f"{place}: {field} is empty")
        if pair.positive == pair.negative:
            raise AUSteerError(f"{place}: both answers are {pair.positive[:40]!r}; a pair needs two different ones")


def as_pairs(rows: Sequence[Sequence[str]], first: int | None = None) -> list[Pair]:
    """Turn [prompt, right, wrong] rows into pairs. first: use only the first so many, and accept empty or equal answers."""
    try:
        pairs = [Pair(*row) for row in rows if not isinstance(row, str)]
    except TypeError:
        pairs = []
    if len(pairs) < len(rows):
        raise AUSteerError("every pair must be [prompt, right answer, wrong answer]")
    if first is None:
        check_pairs(pairs)
    elif not pairs:
        raise AUSteerError("no pairs given; ranking needs at least one")
    return pairs[:first]


def write_pairs(path: str | Path, pairs: Sequence[Pair], groups: Sequence[str] | None = None) -> None:
    """Write a line per pair, with the name of its group if there are groups."""
    rows = [dict(zip(FIELDS, pair, strict=True)) for pair in pairs]
    if groups is not None:
        rows = [row | {"group": name} for row, name in zip(rows, groups, strict=True)]
    write_json_lines(Path(path), rows)


def pairs_hash(pairs: Iterable[Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(list(pair), ensure_ascii=True).encode())
    return digest.hexdigest()


def _json_rows(text: str, path: Path, fields: Sequence[str]) -> Iterable[tuple[int, Sequence]]:
    if _is_array_of_rows(text):
        yield from ((n, _row(row, fields, f"{path}, row {n}")) for n, row in enumerate(json.loads(text), 1))
        return
    for number, row in read_json_lines(path):
        yield number, _row(row, fields, f"{path}, line {number}")


def _is_array_of_rows(text: str) -> bool:
    """Say whether a file is one JSON array of all rows, as the authors write their triples, and not a row per line."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(whole, list) and bool(whole) and all(isinstance(row, list | dict) for row in whole)


def _row(row: object, fields: Sequence[str], place: str) -> Sequence:
    if isinstance(row, list) and len(row) == len(fields):
        return row
    if isinstance(row, dict):
        return _pick(row, fields, place)
    raise AUSteerError(f"{place}: expected an object with {', '.join(fields)}, or a list of {len(fields)}")


def _csv_rows(text: str, path: Path, fields: Sequence[str]) -> Iterable[tuple[int, Sequence]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            yield reader.line_num, _pick(row, fields, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise AUSteerError(f"{path}: not CSV ({error})") from None


def _pick(row: dict, fields: Sequence[str], place: str) -> Sequence:
    missing = [field for field in fields if row.get(field) is None]
    if missing:
        names = ", ".join(str(key) for key in row if key is not None)
        raise AUSteerError(f"{place}: {', '.join(missing)} is missing or empty (fields there: {names})")
    return [row[field] for field in fields]
