"""Types of request fields that the API shares, and the words for a value that does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails

from optlm.errors import did_you_mean
from optlm.serve.errors import ApiError

__all__ = [
    "MAX_PROMPTS", "Biases", "Prompt", "Stops", "Strict", "TextOrIds", "TokenIds", "prompts_of",
    "read_fields",
]  # fmt: skip

MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024

_TOKEN = re.compile(r"[0-9]{1,9}")


class Strict(BaseModel):
    """Unknown fields are refused, and no value is converted: "1" and true are no numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Fields = TypeVar("Fields", bound=Strict)


def _prompt(value: Any) -> Any:
    """A text, token ids, or a list of either; which ids there are is the model's to say."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(
            f"must be a text, a list of token ids, or a list of either, not {_kind(value)}"
        )
    if not value:
        raise ValueError("is an empty list; give at least one text or token id")
    kinds = {_kind(item) for item in value[: MAX_PROMPTS + 1]}
    if kinds == {"a whole number"}:
        return value
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; at most {MAX_PROMPTS} are allowed")
    if kinds not in ({"a text"}, {"a list"}):
        raise ValueError(
            f"is a list of {' and '.join(sorted(kinds))}; it must be all texts or all token ids"
        )
    if kinds == {"a list"} and not all(value):
        raise ValueError(
            "has an empty list; a prompt of token ids needs at least one, such as 2 for </s>"
        )
    return value


def _text_or_ids(value: Any) -> Any:
    """A text, or token ids, which are the model's to check."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a text or a list of token ids, not {_kind(value)}")
    if not value:
        raise ValueError("is an empty list; give a text, or at least one token id")
    kinds = {_kind(item) for item in value}
    if kinds != {"a whole number"}:
        raise ValueError(f"is a list of {' and '.join(sorted(kinds))}; it must be all token ids")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a whole number", float: "a broken number", str: "a text", list: "a list"}
    return names.get(type(value), "null" if value is None else "an object")


def _biases(value: dict[str, float]) -> dict[str, float]:
    if len(value) > MAX_BIASES:
        raise ValueError(f"has {len(value)} entries; at most {MAX_BIASES} are allowed")
    for name in value:
        if not (name.isascii() and _TOKEN.fullmatch(name)):
            raise ValueError(
                f"has the name {name!r:.80}; it must be a token id, as a decimal number"
            )
    return value


def _stops(value: str | list[str] | None) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} texts; at most {MAX_STOPS} are allowed")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise ValueError(
                f"has a text of {len(text)} characters; it needs 1 to {MAX_STOP_CHARACTERS}"
            )
    return stops


_TOKEN_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    Any,
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TOKEN_LIST,
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _TOKEN_LIST, "minItems": 1},
            ]
        }
    ),
]
TextOrIds = Annotated[
    Any,
    BeforeValidator(_text_or_ids),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TOKEN_LIST]}),
]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Biases = Annotated[dict[str, Bias], AfterValidator(_biases)]
Stops = Annotated[str | list[str], AfterValidator(_stops)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**24)]], Field(max_length=1024)]


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a validated `Prompt` field."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)


def read_fields(model: type[Fields], body: Any) -> Fields:
    """Validate a parsed body.

    Raises:
        ApiError: 400 that names the first field at fault, its value and what it may be.
    """
    if not isinstance(body, dict):
        raise ApiError(
            400, f"the body must be a JSON object, not {_kind(body)}", code="invalid_json"
        )
    try:
        return model.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
    raise _refusal(details, list(model.model_fields))


def _refusal(details: Sequence[ErrorDetails], known: Sequence[str]) -> ApiError:
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    place = [str(part) for part in first["loc"] if not _is_branch(part)]
    name = ".".join(place) or "the body"
    if first["type"] == "extra_forbidden":
        near = did_you_mean(place[-1], known) if len(place) == 1 else ""
        return ApiError(
            400, f"unknown field {name!r:.80}{near}", param=name[:80], code="unknown_field"
        )
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=name, code="missing_field")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        reason = f"is {_brief(first['input'])}; {reason[:1].lower()}{reason[1:]}"
    return ApiError(400, f"{name} {reason}", param=name, code="invalid_value")


def _is_branch(part: str | int) -> bool:
    """Whether a step of pydantic's path names a member of a union and not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _brief(value: Any) -> str:
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"{_kind(value)} of {len(value)}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return _kind(value)
    return text if len(text) <= 80 else text[:77] + "..."
