"""Read CSV, TSV, JSONL and lists of URLs: one pass finds where each shard's rows begin, and a shard reads only those."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.sources.columns import Columns, row_item
from data_tools.sources.item import FAILED_TO_DOWNLOAD, Item, Loss
from megamoe.core.errors import DataError

_MAX_LINE = 16 << 20  # bytes; a file with a longer line is no such table
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})([.]\d+)?([eE][+-]?\d{1,3})?")
_BOM = b"\xef\xbb\xbf"
_PEEK = 100  # JSONL rows whose keys become the columns
_DELIMITERS = {"csv": ",", "tsv": "\t"}

Row = list[str] | str  # the fields of a CSV row; the line of a JSONL or txt file


@dataclass(frozen=True)
class TextTableChunk:
    """``samples`` rows of a text table from byte ``offset`` on; ``first`` is the number of the first row, from 1."""

    path: Path
    kind: str
    header: tuple[str, ...]
    columns: Columns
    offset: int
    first: int
    samples: int

    def items(self) -> Iterator[Item]:
        """Read the rows."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            rows = _rows(self.path, _Lines(self.path, file, self.offset), self.kind)
            for number, row in zip(range(self.first, self.first + self.samples), rows, strict=False):
                name = f"{self.path.name} row {number}"
                try:
                    yield row_item(_parse(row, self), name, self.columns)
                except Loss as loss:
                    yield Item(name, loss=loss)


def read_header(path: Path, kind: str) -> tuple[str, ...]:
    """Read the column names: the first row of CSV and TSV, the keys of the first 100 rows of JSONL, ``url`` for a list.

    Raises:
        DataError: the table is empty, or a name repeats.
    """
    if kind == "txt":
        return ("url",)
    with open(path, "rb") as file:
        rows = _rows(path, _Lines(path, file, 0), kind)
        if kind == "jsonl":
            found = dict.fromkeys(key for _, row in zip(range(_PEEK), rows, strict=False) for key in _object(row) or ())
            if not found:
                raise DataError(f"{path}: no JSON object in its first lines; JSONL is one object per line")
            return tuple(found)
        header = tuple(str(name).strip() for name in next(rows, []))
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        why = f"column {twice[0]!r} repeats" if twice else "the table is empty"
        raise DataError(f"{path}: {why}; its first row must name the columns")
    return header


def cut(path: Path, kind: str, header: tuple[str, ...], columns: Columns, shard_size: int) -> Iterator[TextTableChunk]:
    """Read the table once and yield a chunk per shard, with the place where its rows begin.

    Raises:
        DataError: it is not such a table.
    """
    with open(path, "rb") as file:
        lines = _Lines(path, file, 0)
        rows = _rows(path, lines, kind)
        if kind in _DELIMITERS:
            next(rows)
        start, first, number = lines.at, 1, 0
        for number, _ in enumerate(rows, 1):
            if number - first + 1 == shard_size:
                yield TextTableChunk(path, kind, header, columns, start, first, shard_size)
                start, first = lines.at, number + 1
        if number >= first:
            yield TextTableChunk(path, kind, header, columns, start, first, number - first + 1)


class _Lines:
    """Iterate over lines of text; ``at`` is the offset after the last line read."""

    def __init__(self, path: Path, file: Any, at: int) -> None:
        self._path, self._file, self.at = path, file, at

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise DataError(f"{self._path}: a line of more than {_MAX_LINE} bytes at byte {self.at}; is it a table?")
            content = line if self.at else line.removeprefix(_BOM)
            self.at += len(line)
            yield content.decode("utf-8", "surrogateescape")  # such a row is refused where it is used


def _rows(path: Path, lines: _Lines, kind: str) -> Iterator[Row]:
    if kind not in _DELIMITERS:
        yield from (line.strip() for line in lines if line.strip())
        return
    csv.field_size_limit(_MAX_LINE)
    # Strict, because an unclosed quote would otherwise swallow all following rows silently.
    reader = csv.reader(iter(lines), delimiter=_DELIMITERS[kind], strict=True)
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise DataError(
            f'{path}: line {reader.line_num}: {error}; quote fields as CSV does ("" for a quote), or give JSONL'
        ) from error


def _parse(row: Row, chunk: TextTableChunk) -> dict[str, Any]:
    if chunk.kind == "txt":
        return {"url": _utf8(str(row))}
    if isinstance(row, str):
        content = _object(_utf8(row))
        if content is None:
            raise Loss(FAILED_TO_DOWNLOAD, "row: no JSON object")
        return content
    if len(row) != len(chunk.header):
        message = f"row: {len(row)} fields where the header has {len(chunk.header)}"
        raise Loss(FAILED_TO_DOWNLOAD, "row: not as many fields as the header", message)
    text = (chunk.columns.picture, chunk.columns.caption)
    fields = zip(chunk.header, map(_utf8, row), strict=True)
    return {name: value if name in text else _value(value) for name, value in fields}


def _value(text: str) -> str | int | float | None:
    """Convert a field that is not a caption, path or URL: to a number if it is a JSON number, to None if empty."""
    if match := _NUMBER.fullmatch(text):
        return float(text) if match.group(2) or match.group(3) else int(text)
    return text or None


def _object(row: Row) -> dict[str, Any] | None:
    try:
        content = json.loads(str(row))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeError as error:
        raise Loss(FAILED_TO_DOWNLOAD, "row: not UTF-8") from error
    return text
