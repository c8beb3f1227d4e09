"""Read the rows of a data set from a file of any accepted layout, and give them the same few fields.

Layouts: JSON Lines, one JSON array, Parquet, CSV and TSV. Text is kept as it is, spaces included. An error names the file
and the line (or row): a broken data set should not become a number.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from austeer.errors import AUSteerError
from eval.data.fields import LIMIT, texts


class RowSource:
    """Describe a data set to read. A subclass only has to give `name` and `keys`."""

    name: str
    keys: tuple[str, ...]  # the fields that make two rows the same question
    data_of: str | None = None  # the data set whose files these rows are in, if it is another
    columns_of_table: dict[int, str] = {}  # of a CSV without a heading, and of a TSV whatever its heading
    catalogue: dict | None = None  # the entry, as datasets/catalogue.json has it, if it is not there

    @classmethod
    def read_row(cls, raw: dict) -> dict:
        """Return the fields of a raw row, checked with the functions of eval/data/fields.py."""
        return {**raw, **texts(raw, *cls.keys)}

    @classmethod
    def in_split(cls, row: dict, split: str) -> bool:
        """Return whether a row of this split's file belongs to the split."""
        return True


def read_file(source: type[RowSource], split: str, path: Path) -> list[dict]:
    try:
        rows = normalise(source, split, _raw_rows(path, source))
    except OSError as error:
        raise AUSteerError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise AUSteerError(f"{path} holds no rows of the {split} split of {source.name}; fetch or copy it again")
    return rows


def normalise(source: type[RowSource], split: str, raw_rows: Iterable[tuple[str, object]]) -> list[dict]:
    """Return the rows of the split, read from (place, raw row)."""
    rows = []
    for place, raw in raw_rows:
        if not isinstance(raw, dict):
            raise AUSteerError(f"{place}: a {type(raw).__name__} instead of an object with named fields")
        try:
            row = source.read_row(raw)
        except AUSteerError as error:
            raise AUSteerError(f"{place}: {error}") from None
        if source.in_split(row, split):
            rows.append(row)
    return rows


def _raw_rows(path: Path, source: type[RowSource]) -> Iterator[tuple[str, object]]:
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    table = {".csv": _csv, ".tsv": _tsv}.get(path.suffix.lower())
    return table(path, source) if table else _json(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LIMIT + 1), b""), 1):
            if len(line) > LIMIT:
                raise AUSteerError(f"{path}, line {number}: over {LIMIT // 10**6} MB long; this is not a file of rows")
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


def _csv(path: Path, source: type[RowSource]) -> Iterator[tuple[str, object]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    heading: list[str] | None = None  # None: columns are named by their position
    try:
        for number, cells in enumerate(reader):
            place = f"{path}, line {reader.line_num}"
            if number == 0 and not (source.columns_of_table and cells[0].isdecimal()):
                names = [cell.strip() for cell in cells]
                heading = None if source.columns_of_table and source.keys[0] not in names else names
            elif heading and len(cells) != len(heading):
                raise AUSteerError(f"{place}: {len(cells)} columns, but the heading has {len(heading)}")
            elif heading:
                yield place, dict(zip(heading, cells, strict=True))
            elif len(cells) < (least := max(source.columns_of_table) + 1):
                raise AUSteerError(f"{place}: {len(cells)} columns instead of at least {least}")
            else:
                yield place, {name: cells[at] for at, name in source.columns_of_table.items()}
    except csv.Error as error:
        raise AUSteerError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _tsv(path: Path, source: type[RowSource]) -> Iterator[tuple[str, object]]:
    """Read a heading, then rows with tabs only: quotation marks are text here."""
    names = list(source.columns_of_table.values())
    for number, line in _lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1:
            names = names or cells
        elif line.strip():
            if len(cells) != len(names):
                raise AUSteerError(f"{path}, line {number}: {len(cells)} columns instead of {len(names)}")
            yield f"{path}, line {number}", dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow  # slow to import, and only this layout needs it
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # pyarrow's errors have several lines
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise AUSteerError(f"{path} is damaged or not a Parquet file ({what})") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
