"""Which `Starter` a format of rows has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from optlm.batch.inputs import RowFault
from optlm.batch.lines import RowError, parse_json
from optlm.batch.plain import PlainRows
from optlm.batch.settings import BatchSettings
from optlm.batch.work import Starter
from optlm.engine.llm import LLM
from optlm.errors import RequestError

__all__ = ["find_format", "starter_for"]


def find_format(rows: Iterable[bytes | RowFault]) -> Literal["plain", "openai"]:
    """What the first row is: a request has a url and a body."""
    first = next(iter(rows), b"")
    try:
        fields = parse_json(first) if isinstance(first, bytes) else None
    except RowError:
        return "plain"
    is_request = isinstance(fields, dict) and "url" in fields and "body" in fields
    return "openai" if is_request else "plain"


def starter_for(llm: LLM, settings: BatchSettings) -> Starter:
    """The starter of a format that is known, no longer "auto".

    Raises:
        RequestError: requests need what is not installed.
    """
    if settings.row_format == "plain":
        return PlainRows(llm, settings)
    try:
        from optlm.batch.openai import OpenAIRows
    except ModuleNotFoundError as error:
        raise RequestError(
            f"rows that are requests need {error.name}, which is not installed: "
            "pip install 'optlm[serve]'"
        ) from None
    return OpenAIRows(llm, settings)
