"""Strict JSON objects from small files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.files import read_small


class RepeatedKeyError(ValueError):
    """A JSON object names one key twice; readers disagree on which value counts."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        RepeatedKeyError: a key appears twice in one object, at any depth.
        ValueError: not UTF-8, not JSON, too deeply nested, or not an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_object(path: Path, limit: int, code: str) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; a fault of `code` if it holds none."""
    try:
        return parse_object(read_small(path, limit))
    except ValueError as error:
        raise fault_error(code, path, f"is not a JSON object: {error}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise RepeatedKeyError(f"the key {key[:80]!r} appears twice")
        values[key] = value
    return values
