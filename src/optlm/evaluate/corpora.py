"""Texts by language from files of records."""

from __future__ import annotations

from collections.abc import Sequence

from optlm.data.inputs import find_inputs
from optlm.data.records import read_rows
from optlm.data.report import ReadReport
from optlm.errors import RequestError

__all__ = ["texts_by_language"]


def texts_by_language(
    files: Sequence[str], *, lang: str | None = None, limit: int | None = None
) -> tuple[dict[str, list[str]], int]:
    """The texts of each language in order, and how many records were left out.

    Args:
        files: as `optlm data` takes them: JSON Lines with "text" and "lang", text, Parquet.
        lang: of records that do not tell theirs.
        limit: only the first so many texts of a language.

    Raises:
        RequestError: no record has a text and a language.
        CorpusError: a file is missing or damaged.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}; it must be at least 1")
    report = ReadReport()
    texts: dict[str, list[str]] = {}
    left_out = 0
    for _, fields in read_rows(find_inputs(files), report):
        record = fields if isinstance(fields, dict) else {}
        text, language = record.get("text"), record.get("lang", lang)
        if not isinstance(text, str) or not text.strip() or not isinstance(language, str):
            left_out += 1
            continue
        found = texts.setdefault(language, [])
        if limit is None or len(found) < limit:
            found.append(text)
    if not texts:
        raise RequestError(
            f"no record of {', '.join(files)} has a text and a language; "
            'records have "text" and "lang", or name the language with --lang'
        )
    return texts, left_out + report.broken
