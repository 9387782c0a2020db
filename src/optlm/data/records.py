"""Records from JSON Lines, plain text and Parquet: one document, or one prompt with its response.

Whatever cannot be used (no JSON, no text, not UTF-8, too long) is counted in a `ReadReport` with
its place and reason, up to the limit set there.
"""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from optlm.data.inputs import InputFile
from optlm.data.lines import LINE_LIMIT, Progress, open_blocks, read_lines
from optlm.data.report import CorpusError, ReadReport
from optlm.errors import ConfigError
from optlm.tokenizer import MAX_TEXT

__all__ = ["PAIR", "SPLITS", "Record", "read_records", "read_rows"]

PAIR = ("prompt", "response")
SPLITS = ("file", "paragraph", "line")  # what one document of a text file is
_PIECE = 2**20  # characters; a text file that is one document is cut near here
_ROWS = 64  # of a Parquet file, at once in memory


@dataclass(frozen=True, slots=True)
class Record:
    """One usable line or row.

    Attributes:
        fields: everything it holds: ``text``, or ``prompt`` and ``response``, and what else there
            is (``source``, ``license`` ...).
        text: what is judged and compared: the text, or prompt and response on lines of their own.
        place: file name and line (or row), to show to people.
    """

    fields: dict[str, Any]
    text: str
    place: str

    @property
    def is_pair(self) -> bool:
        """Whether it is a prompt with its response."""
        return "text" not in self.fields


def read_records(
    files: Sequence[InputFile],
    report: ReadReport,
    *,
    pairs: bool = True,
    split: str = "file",
    line_limit: int = LINE_LIMIT,
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Yield the usable records of `files` in order; broken ones are counted into `report`.

    Documents are not counted here: whoever keeps one counts it.

    Args:
        pairs: whether records of ``prompt`` and ``response`` count as usable.
        split: for text files, what one document is: the "file" (cut after a paragraph or line
            when it grows beyond 1,048,576 characters), each "paragraph" or each "line".
        line_limit: bytes; longer lines are broken.

    Raises:
        CorpusError: a file is missing or damaged, or more is broken than `report` allows.
        ConfigError: `split` is unknown.
    """
    rows = read_rows(files, report, split=split, line_limit=line_limit, progress=progress)
    for place, fields in rows:
        try:
            yield Record(fields, _text_of(fields, pairs), place)
        except ValueError as error:
            report.add_broken(place, str(error)[:200])


def read_rows(
    files: Sequence[InputFile],
    report: ReadReport,
    *,
    split: str = "file",
    line_limit: int = LINE_LIMIT,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield the place and the parsed content of every line or row. Arguments as `read_records`."""
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    for file in files:
        if file.format == "parquet":
            yield from _parquet_rows(file, progress)
        elif file.format == "jsonl":
            yield from _json_rows(file, report, line_limit, progress)
        else:
            yield from _text_rows(file, report, split, line_limit, progress)


def _text_of(fields: Any, pairs: bool) -> str:
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    if "text" in fields or not pairs or not all(name in fields for name in PAIR):
        text = _string(fields, "text")
    else:
        text = f"{_string(fields, 'prompt')}\n{_string(fields, 'response')}"
    if not text:
        raise ValueError("the text is empty")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text):,} characters; the limit is {MAX_TEXT:,}")
    text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return text


def _string(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"it has no {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"its {name!r} is no string but {type(value).__name__}")
    return value


# ---- formats -----------------------------------------------------------------------------------


def _decoded_lines(
    file: InputFile, report: ReadReport, limit: int, progress: Progress | None
) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines; a byte order mark is dropped."""
    lines = read_lines(file.path, file.compression, limit=limit, progress=progress)
    for number, line in enumerate(lines, start=1):
        place = f"{file.path.name}:{number}"
        if isinstance(line, int):
            report.add_broken(place, f"the line has {line:,} bytes; the limit is {limit:,}")
            continue
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise CorpusError(f"{file.path} is UTF-16; convert it to UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            report.add_broken(place, f"not UTF-8 (byte {error.start} of the line)")


def _json_rows(
    file: InputFile, report: ReadReport, limit: int, progress: Progress | None
) -> Iterator[tuple[str, Any]]:
    for number, line in _decoded_lines(file, report, limit, progress):
        if not line.strip():
            continue
        place = f"{file.path.name}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            report.add_broken(place, f"no JSON: {error}"[:200])
            continue
        yield place, fields


def _text_rows(
    file: InputFile, report: ReadReport, split: str, limit: int, progress: Progress | None
) -> Iterator[tuple[str, Any]]:
    held: list[str] = []
    begun = size = 0

    def take() -> Iterator[tuple[str, Any]]:
        text = "\n".join(held).strip("\n")
        held.clear()
        if text.strip():
            yield f"{file.path.name}:{begun}", {"text": text}

    for number, line in _decoded_lines(file, report, limit, progress):
        if "\0" in line:
            report.add_broken(f"{file.path.name}:{number}", "it holds NUL bytes; no text")
            continue
        line = line.removesuffix("\r")
        begun, size = (begun, size + 1 + len(line)) if held else (number, len(line))
        held.append(line)
        blank = not line.strip()
        full = size > _PIECE and (blank or size > 2 * _PIECE)
        if split == "line" or full or (split == "paragraph" and blank):
            yield from take()
    yield from take()


def _parquet_rows(file: InputFile, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    done = 0
    try:
        with _seekable(file) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = _plain_columns(table.schema_arrow)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{file.path.name}, row {number}", fields
                if progress:
                    part = file.size * number // max(1, table.metadata.num_rows)
                    progress(part - done)
                    done = part
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"cannot read {file.path}: {error}") from error


def _seekable(file: InputFile) -> IO[bytes]:
    """The file itself, or a temporary copy of what is compressed in it."""
    if not file.compression:
        return file.path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        for block in open_blocks(file.path, file.compression):
            copy.write(block)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _plain_columns(schema: Any) -> list[str]:
    """Columns of strings and numbers; lists, images and the like are not read."""
    from pyarrow import types

    def plain(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        text = types.is_string(kind) or types.is_large_string(kind)
        return bool(text or types.is_integer(kind) or types.is_floating(kind))

    return [field.name for field in schema if plain(field.type)]
