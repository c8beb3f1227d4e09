"""Rows of a task from a file of any accepted layout: read, validated, and given the same few fields.

Layouts: JSON Lines, one JSON array, Parquet, the authors' COPA as CSV, StoryCloze as TSV. Text is kept as it is,
spaces included. An error names the file and the line (or row): a broken data set should not become a number.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from austeer.errors import AUSteerError

LIMIT = 5_000_000  # of one line or one text: more is not a row of any of these data sets
COPA_POSITIONS = {0: "label", 2: "premise", 3: "question", 4: "choice1", 5: "choice2"}  # the authors', unnamed
STORY_COLUMNS = ("id", "sent1", "sent2", "sent3", "sent4", "ending1", "ending2", "label")
KEYS = {  # what makes two rows the same question
    "boolq": ("question", "passage"),
    "copa": ("premise", "question", "choice1", "choice2"),
    "winogrande": ("sentence", "option1", "option2"),
    "storycloze": ("sent1", "sent2", "sent3", "sent4", "ending1", "ending2"),
    "svamp": ("body", "question"),
    "mawps": ("question",),
    "gsm8k": ("question",),
    "toxicity": ("prompt",),
    "bpo": ("prompt",),
}


def read_file(task: str, split: str, path: Path) -> list[dict]:
    """The rows of one split in this file, normalised."""
    try:
        rows = normalise(task, split, _raw_rows(path))
    except OSError as error:
        raise AUSteerError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise AUSteerError(f"{path} holds no rows of the {split} split of {task}; fetch or copy it again")
    return rows


def normalise(task: str, split: str, raw_rows: Iterable[tuple[str, object]]) -> list[dict]:
    """Normalised rows from (place, raw row); raw rows of RealToxicityPrompts hold both splits."""
    rows = []
    for place, raw in raw_rows:
        if not isinstance(raw, dict):
            raise AUSteerError(f"{place}: a {type(raw).__name__} where an object with named fields must be")
        try:
            row = _FIELDS[task](raw)
        except AUSteerError as error:
            raise AUSteerError(f"{place}: {error}") from None
        if task != "toxicity" or row["challenging"] == (split == "test"):
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSON Lines under a temporary name, renamed last: there is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    except OSError as error:
        raise AUSteerError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def key_of(task: str, row: dict) -> tuple:
    return tuple(row[name] for name in KEYS[task])


# layouts


def _raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    layouts = {".parquet": _parquet, ".csv": _csv, ".tsv": _tsv}
    return layouts.get(path.suffix.lower(), _json)(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LIMIT + 1):
            number += 1
            if len(line) > LIMIT:
                raise AUSteerError(f"{path}, line {number}: over {LIMIT // 10**6} MB long; this is no file of rows")
            yield number, _decode(line, f"{path}, line {number}")


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors put a byte-order mark in front
    except UnicodeDecodeError as error:
        raise AUSteerError(f"{place}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise AUSteerError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise AUSteerError(f"{place}: JSON that no data set has ({type(error).__name__})") from None


def _json(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        is_array = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        array = _parse(_decode(path.read_bytes(), str(path)), str(path))
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(array, 1))
        return
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    names: list[str] | None = None  # of the columns; None: the authors' positions
    try:
        for number, cells in enumerate(reader):
            place = f"{path}, line {reader.line_num}"
            if number == 0 and cells[:1] not in (["0"], ["1"]):  # a heading, rather than a label
                heading = [cell.strip() for cell in cells]
                names = heading if "premise" in heading else None
            elif names and len(cells) != len(names):
                raise AUSteerError(f"{place}: {len(cells)} columns where the heading has {len(names)}")
            elif names:
                yield place, dict(zip(names, cells, strict=True))
            elif len(cells) <= max(COPA_POSITIONS):
                raise AUSteerError(f"{place}: {len(cells)} columns where at least {max(COPA_POSITIONS) + 1} must be")
            else:
                yield place, {name: cells[at] for at, name in COPA_POSITIONS.items()}
    except csv.Error as error:
        raise AUSteerError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _tsv(path: Path) -> Iterator[tuple[str, object]]:
    """StoryCloze: a heading, then tabs only; quotation marks are text there."""
    for number, line in _lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 or not line.strip():
            continue
        if len(cells) != len(STORY_COLUMNS):
            raise AUSteerError(f"{path}, line {number}: {len(cells)} columns where {len(STORY_COLUMNS)} must be")
        yield f"{path}, line {number}", dict(zip(STORY_COLUMNS, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow  # slow to import, and only this layout needs it
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # pyarrow's errors have several lines
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise AUSteerError(f"{path} is damaged or no Parquet file ({what})") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


# fields


def _pick(row: dict, names: Sequence[str]) -> object:
    for name in names:
        if name in row:
            return row[name]
    there = ", ".join(" ".join(str(name)[:30].split()) for name in list(row)[:12]) or "none"
    raise AUSteerError(f"no {' or '.join(names)} (fields there: {there})")


def _text(row: dict, *names: str, empty: bool = False) -> str:
    value = _pick(row, names)
    if not isinstance(value, str):
        raise AUSteerError(f"{names[0]} is {type(value).__name__}, not text")
    if len(value) > LIMIT:
        raise AUSteerError(f"{names[0]} is over {LIMIT // 10**6} MB long; this is no row of a data set")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a character, which no file and no tokenizer can
        raise AUSteerError(f"{names[0]} holds half a character (a lone surrogate)") from None
    if not empty and not value.strip():
        raise AUSteerError(f"{names[0]} is empty")
    return value


def _steps(row: dict, *names: str) -> str:
    text = _text(row, *names)
    if "####" not in text:
        raise AUSteerError(f"{names[0]} does not end in '#### number': {text[-40:]!r}")
    return text


def _number(row: dict, *names: str) -> float:
    value = _pick(row, names)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise AUSteerError(f"{names[0]} is {str(value)[:40]!r}, not a number")
    return number


def _score(row: dict, *names: str) -> float | None:
    return None if _pick(row, names) is None else _number(row, *names)


def _truth(row: dict, *names: str) -> bool:
    value = _pick(row, names)
    if not isinstance(value, bool):
        raise AUSteerError(f"{names[0]} is {str(value)[:40]!r}; it must be true or false")
    return value


def _label(row: dict, name: str, *allowed: int | str):
    value = _pick(row, (name,))
    for label in allowed:
        if str(value).strip() == str(label):  # CSV holds "1" where JSON holds 1
            return label
    raise AUSteerError(f"{name} is {str(value)[:40]!r}; it must be {' or '.join(map(str, allowed))}")


def _texts(row: dict, *names: str) -> dict[str, str]:
    return {name: _text(row, name) for name in names}


def _boolq(row: dict) -> dict:
    return {**_texts(row, "question", "passage"), "answer": _truth(row, "answer", "label")}


def _copa(row: dict) -> dict:
    question = _label(row, "question", "cause", "effect")
    texts = _texts(row, "premise", "choice1", "choice2")
    return {"premise": texts.pop("premise"), "question": question, **texts, "label": _label(row, "label", 0, 1)}


def _winogrande(row: dict) -> dict:
    texts = _texts(row, "sentence", "option1", "option2")
    name = _text(row, "qID", empty=True) if "qID" in row else ""
    return {**texts, "answer": _label(row, "answer", "1", "2"), "qID": name}


def _storycloze(row: dict) -> dict:
    return {**_texts(row, *STORY_COLUMNS[1:-1]), "label": _label(row, "label", 1, 2)}


def _svamp(row: dict) -> dict:
    return {
        "body": _text(row, "body", "Body"),
        "question": _text(row, "question", "Question"),
        "answer": _number(row, "answer", "Answer"),
    }


def _mawps(row: dict) -> dict:
    return {"question": _text(row, "question"), "answer": _steps(row, "answer_steps", "answer")}


def _gsm8k(row: dict) -> dict:
    return {"question": _text(row, "question"), "answer": _steps(row, "answer")}


def _toxicity(row: dict) -> dict:
    prompt, challenging = row.get("prompt"), row.get("challenging", True)
    if isinstance(prompt, dict):  # official: text and scores nested
        continuation = _pick(row, ("continuation",))
        if not isinstance(continuation, dict):
            raise AUSteerError("continuation is not an object of text and scores")
        row = {
            "prompt": _pick(prompt, ("text",)),
            "prompt_toxicity": prompt.get("toxicity"),
            "continuation": _pick(continuation, ("text",)),
            "continuation_toxicity": continuation.get("toxicity"),
            "challenging": _truth(row, "challenging"),
        }
    elif "continuation" not in row:  # the authors' list of challenging prompts: nothing but the prompt
        row = {**row, "prompt_toxicity": None, "continuation": "", "continuation_toxicity": None}
        row["challenging"] = challenging
    return {
        "prompt": _text(row, "prompt"),
        "prompt_toxicity": _score(row, "prompt_toxicity"),
        "continuation": _text(row, "continuation", empty=True),
        "continuation_toxicity": _score(row, "continuation_toxicity"),
        "challenging": _truth(row, "challenging"),
    }


def _bpo(row: dict) -> dict:
    # a few official rows have an empty bad_res: kept here, so that counts are the official ones
    return {
        "prompt": _text(row, "prompt", "final_input"),
        "good_res": _text(row, "good_res"),
        "bad_res": _text(row, "bad_res", empty=True),
    }


_FIELDS: dict[str, Callable[[dict], dict]] = {
    "boolq": _boolq,
    "copa": _copa,
    "winogrande": _winogrande,
    "storycloze": _storycloze,
    "svamp": _svamp,
    "mawps": _mawps,
    "gsm8k": _gsm8k,
    "toxicity": _toxicity,
    "bpo": _bpo,
}
