"""Strict JSON: what two readers could understand in two ways is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from optlm.serve.errors import ApiError

__all__ = ["parse_json"]


def parse_json(raw: bytes) -> Any:
    """Parse a body.

    Raises:
        ApiError: 400 for what is not UTF-8 or not JSON, doubled names, NaN and Infinity, numbers of
            thousands of digits, and nesting beyond the interpreter's depth.
    """
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_doubles, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise _not_json(f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _not_json("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"is not JSON: {error}") from None
    except ValueError:
        raise _not_json("has a number of too many digits") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in found if names.count(name) > 1)
        raise _not_json(f"has the name {double!r:.80} twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _not_json(f"has {name}, which is no JSON number")


def _not_json(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", code="invalid_json")
