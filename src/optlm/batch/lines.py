"""Between rows of JSON and values: strict on the way in, bytes on the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optlm.batch.inputs import RowFault

__all__ = ["RowError", "as_line", "parse_json"]


class RowError(Exception):
    """A row that cannot be served."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = RowFault(code, message, param)


def parse_json(content: bytes) -> Any:
    """Read strict JSON in UTF-8.

    Raises:
        RowError: it is not.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"the row is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise RowError("invalid_json", "the row is nested too deeply") from None
    except ValueError as error:
        raise RowError("invalid_json", f"the row is not JSON: {error}"[:300]) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def as_line(record: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; with escapes where a kept field has half a character (a lone surrogate)."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode()
