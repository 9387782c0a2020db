"""Rows of JSON Lines and Parquet files, one at a time, and what identifies a whole input."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from optlm.data.inputs import InputFile, find_inputs
from optlm.data.lines import read_lines
from optlm.data.report import CorpusError
from optlm.errors import RequestError

__all__ = [
    "LINE_LIMIT",
    "InputSummary",
    "RowFault",
    "find_input",
    "lines_at",
    "places",
    "read_input",
    "summarize",
]

LINE_LIMIT = 2**23  # bytes of one row; prompts of a model's context have some tens of thousands
_PIECE = 2**20  # of a line that is too long, at once in memory
_PARQUET_ROWS = 64  # at once in memory


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be served, and why.

    Attributes:
        code: stable and machine-readable, such as "invalid_json".
        param: the field at fault, if one is.
    """

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class InputSummary:
    """What an input holds: its number of rows and the SHA-256 of all of them."""

    rows: int
    sha256: str


def find_input(name: str | Path) -> InputFile:
    """The file `name`, which must be JSON Lines or Parquet; plain, ``.gz`` or ``.zst``.

    Raises:
        RequestError: it is text, or no regular file.
        ConfigError: its ending is unknown.
        FileNotFoundError: there is none.
    """
    path = Path(name)
    path.stat()
    if not path.is_file():
        raise RequestError(f"{name} is no regular file; give one, or - for standard input")
    (file,) = find_inputs([str(path)])
    if file.format == "text":
        raise RequestError(
            f"{name} is text; rows come as JSON Lines or Parquet. `optlm generate --lines -f` "
            "takes a prompt a line"
        )
    return file


def read_input(
    file: InputFile, *, columns: Collection[str] | None = None
) -> Iterator[bytes | RowFault]:
    """Yield every row as the JSON it is, in order; blank lines are no rows.

    Args:
        columns: of Parquet, those to read (the first must be there); None reads all.

    Raises:
        CorpusError: the file is damaged, or UTF-16.
        RequestError: a Parquet file lacks the first of `columns`.
    """
    return _parquet_rows(file, columns) if file.format == "parquet" else _lines(file)


def summarize(rows: Iterable[bytes | RowFault]) -> InputSummary:
    """Read all rows once."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(row if isinstance(row, bytes) else row.message.encode())
        digest.update(b"\n")
        count += 1
    return InputSummary(rows=count, sha256=digest.hexdigest())


def _lines(file: InputFile) -> Iterator[bytes | RowFault]:
    lines = read_lines(file.path, file.compression, limit=LINE_LIMIT)
    return (row for _, row in _rows_of((0, line) for line in lines))


def _rows_of(lines: Iterable[tuple[int, bytes | int]]) -> Iterator[tuple[int, bytes | RowFault]]:
    """Of numbered lines from the beginning of a file (of long ones only the length), the rows."""
    for number, (place, line) in enumerate(lines):
        if isinstance(line, int):
            told = f"the line has {line:,} bytes; the limit is {LINE_LIMIT:,}"
            yield place, RowFault("line_too_long", told)
            continue
        if number == 0:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise CorpusError("the input is UTF-16; convert it to UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield place, line


def places(path: Path, every: int) -> Iterator[tuple[int, int]]:
    """Yield the number of every `every`-th row of a plain file, and the byte where it begins."""
    for row, (place, _) in enumerate(_rows_of(_placed_lines(path, 0))):
        if row % every == 0:
            yield row, place


def lines_at(path: Path, place: int, count: int) -> Iterator[bytes | RowFault]:
    """Yield `count` rows of a plain file from a place that `places` gave."""
    rows = _rows_of(_placed_lines(path, place))
    return (row for _, row in itertools.islice(rows, count))


def _placed_lines(path: Path, place: int) -> Iterator[tuple[int, bytes | int]]:
    """Lines without their line break (of long ones only the length), and where they begin."""
    with path.open("rb") as file:
        file.seek(place)
        while line := file.readline(LINE_LIMIT + 1):
            size = len(line)
            while not line.endswith(b"\n") and (more := file.readline(_PIECE)):
                size, line = size + len(more), more
            bare = size - line.endswith(b"\n")
            yield place, bare if bare > LINE_LIMIT else line.removesuffix(b"\n")
            place += size


def _parquet_rows(file: InputFile, wanted: Collection[str] | None) -> Iterator[bytes | RowFault]:
    import pyarrow
    import pyarrow.parquet

    if file.compression:
        raise RequestError(f"{file.path} is compressed twice; Parquet compresses by itself")
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        there = table.schema_arrow.names
        if wanted is not None and (first := next(iter(wanted))) not in there:
            raise RequestError(
                f"{file.path} has no column {first!r}; it has {', '.join(there)[:300]}"
            )
        columns = None if wanted is None else [name for name in there if name in wanted]
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            yield from map(_as_json, batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"cannot read {file.path}: {error}") from error


def _as_json(fields: dict[str, Any]) -> bytes | RowFault:
    """A row of columns as an object; empty cells are left out."""
    there = {name: value for name, value in fields.items() if value is not None}
    try:
        text = json.dumps(there, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError) as error:
        return RowFault("invalid_value", f"the row cannot be written as JSON: {error}"[:300])
    if len(text) > LINE_LIMIT:
        return RowFault(
            "line_too_long", f"the row has {len(text):,} bytes; the limit is {LINE_LIMIT:,}"
        )
    return text


def _plain(value: object) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")
