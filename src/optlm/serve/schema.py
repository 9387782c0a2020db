"""What the OpenAPI page says of each route."""

from __future__ import annotations

from typing import Any

from optlm.serve.fields import Strict

__all__ = ["describe"]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = ("400", "401", "404", "408", "413", "415", "429", "500", "503")


def describe(name: str, fields: type[Strict] | None) -> dict[str, Any]:
    """The OpenAPI entry of an operation that reads `fields` itself."""
    refused = {"application/json": {"schema": _ERROR}}
    entry: dict[str, Any] = {
        "operationId": name,
        "responses": {
            "200": {"description": "The answer."},
            **{code: {"description": "An error.", "content": refused} for code in _REFUSALS},
        },
    }
    if fields is not None:
        schema = _inlined(fields.model_json_schema())
        entry["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        if fields.__doc__:
            entry["description"] = fields.__doc__
    return entry


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions in their places."""
    known = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(known[part["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in part.items()}

    found: dict[str, Any] = resolve(schema)
    return found
