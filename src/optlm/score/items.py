"""What is scored, read from files: texts, minimal pairs, or contexts with their endings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optlm.data.inputs import InputFile, find_inputs
from optlm.data.records import read_rows
from optlm.data.report import ReadReport
from optlm.errors import RequestError

__all__ = ["FIELDS", "Item", "Kind", "is_table", "read_items"]

Kind = Literal["texts", "pairs", "endings"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "texts": ("text",),
    "pairs": ("good", "bad"),
    "endings": ("context", "endings"),
}
_TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".tsv")
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Item:
    """One line or row.

    Attributes:
        values: those of the wanted fields, in their order.
        others: what else it holds.
        place: file and line, to show to people.
    """

    values: tuple[Any, ...]
    others: dict[str, Any]
    place: str


def is_table(name: str) -> bool:
    """Whether a file holds records (JSON Lines, Parquet, TSV) by its ending, and not plain text."""
    return _ending(name) in _TABLES


def _ending(name: str) -> str:
    """Of the file name, without that of a compression."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def read_items(names: Sequence[str], kind: Kind, fields: Sequence[str]) -> Iterator[Item]:
    """Yield the records of the files in order.

    TSV has the fields as columns, in their order, or anywhere under a first line of names.

    Raises:
        RequestError: a record lacks a field, or a field is no text (or list of texts).
        CorpusError, ConfigError: a file is missing, damaged, not UTF-8, or of no known format.
    """
    for name in names:
        if _ending(name) == ".tsv":
            (file,) = find_inputs([name], format="text")
            rows: Iterator[tuple[str, Any]] = _tsv_rows(file, fields)
        else:
            rows = read_rows(find_inputs([name]), ReadReport(max_broken=0))
        for place, values in rows:
            yield _item(place, values, kind, fields)


def _tsv_rows(file: InputFile, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    header: list[str] | None = None
    for place, record in read_rows([file], ReadReport(max_broken=0), split="line"):
        cells = record["text"].split("\t")
        if header is None:
            named = all(field in cells for field in fields)
            header = cells if named else list(fields)
            if named:
                continue
        if len(cells) != len(header):
            raise RequestError(
                f"{place}: {len(cells)} columns, not {len(header)} ({', '.join(header)}); columns "
                "are parted by one tab each"
            )
        yield place, dict(zip(header, cells, strict=True))


def _item(place: str, values: Any, kind: Kind, fields: Sequence[str]) -> Item:
    if not isinstance(values, dict):
        raise RequestError(f"{place}: it is no JSON object but {type(values).__name__}")
    for field in fields:
        if field not in values:
            there = ", ".join(sorted(values)) or "nothing"
            raise RequestError(
                f"{place}: there is no field {field!r} (there is {there}); name the fields with "
                "--fields"
            )
    wanted = tuple(values[field] for field in fields)
    texts, lists = (wanted[:1], wanted[1:]) if kind == "endings" else (wanted, ())
    for field, value in zip(fields, texts, strict=False):
        if not isinstance(value, str):
            raise RequestError(f"{place}: {field!r} is no text but {type(value).__name__}")
        if not value and kind != "endings":
            raise RequestError(f"{place}: {field!r} is empty; there is nothing to score")
    for value in lists:
        if not isinstance(value, list) or not all(isinstance(ending, str) for ending in value):
            raise RequestError(f"{place}: {fields[1]!r} is no list of texts")
    others = {name: value for name, value in values.items() if name not in fields}
    return Item(wanted, others, place)
