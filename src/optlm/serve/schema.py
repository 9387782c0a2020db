"""What the OpenAPI page says of each route."""

from __future__ import annotations

from typing import Any

from optlm.serve.fields import Strict

__all__ = ["EXAMPLES", "describe"]

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
_SAID = {
    "health": "200 while the engine lives.",
    "ready": "200 while requests are taken.",
    "metrics": "Numbers for Prometheus.",
    "models": "The model and its adapters.",
    "model": "One of them.",
    "completions": "Continue prompts, or read them and tell how likely they are.",
    "chat": "Answer a chat, written out through the operator's template.",
    "score": "How likely each continuation of one context is; the context is read once.",
    "embeddings": "Hidden states of the last layer, pooled over each text.",
    "tokenize": "The token ids of a text.",
    "detokenize": "The text of token ids.",
    "tokenizer_info": "The special tokens.",
    "reload_adapters": "Load what is new in the folder of adapters, forget what is gone.",
}
_STORY = "Once upon a time"
EXAMPLES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": _STORY, "max_tokens": 12, "temperature": 0},
    "chat": {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 16},
    "score": {"context": "The cat sat on the", "continuations": [" mat", " moon"]},
    "embeddings": {"input": ["a cat", "a dog"], "pooling": "mean"},
    "tokenize": {"prompt": _STORY, "return_token_strs": True},
    "detokenize": {"tokens": [2, 696]},
}
_REFUSALS = ("400", "401", "404", "408", "413", "415", "429", "500", "503")


def describe(name: str, fields: type[Strict] | None) -> dict[str, Any]:
    """The OpenAPI entry of an operation that reads `fields` itself."""
    refused = {"application/json": {"schema": _ERROR}}
    entry: dict[str, Any] = {
        "operationId": name,
        "description": _SAID[name],
        "responses": {
            "200": {"description": "The answer."},
            **{code: {"description": "An error.", "content": refused} for code in _REFUSALS},
        },
    }
    if fields is not None:
        schema = _inlined(fields.model_json_schema())
        entry["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": EXAMPLES[name]}},
        }
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
