"""Rows in OpenAI's batch format: a request to the server in, its response out.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
    {"id": "batch_req_0", "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}

`Endpoints` knows the bodies; here is the frame around them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from optlm.batch.endpoints import Asked, Endpoints
from optlm.batch.inputs import RowFault
from optlm.batch.ledger import Result
from optlm.batch.lines import RowError, as_line, parse_json
from optlm.batch.settings import BatchSettings
from optlm.batch.work import Work
from optlm.engine.llm import LLM
from optlm.errors import OptlmError, did_you_mean
from optlm.serve.errors import ApiError, api_error

__all__ = ["OpenAIRows"]

_FIELDS = ("custom_id", "method", "url", "body")


class OpenAIRows:
    """A `Starter` of rows that are requests."""

    def __init__(self, llm: LLM, settings: BatchSettings) -> None:
        self._endpoints = Endpoints(llm, settings)

    def start(self, row: int, content: bytes | RowFault) -> Work | Result:
        custom_id: str | None = None
        try:
            if isinstance(content, RowFault):
                raise RowError(content.code, content.message)
            fields = parse_json(content)
            if isinstance(fields, dict) and isinstance(fields.get("custom_id"), str):
                custom_id = fields["custom_id"]
            url, body = _request(fields, self._endpoints.urls)
            asked = self._endpoints.ask(url, row, body)
        except RowError as error:
            told = {"code": error.fault.code, "message": error.fault.message}
            return Result(as_line(_record(row, custom_id, None, told)), failed=True)
        except (ApiError, OptlmError) as error:
            return _refusal(row, custom_id, error)
        return Work(asked.jobs, lambda: _finish(row, custom_id, asked))


def _finish(row: int, custom_id: str | None, asked: Asked) -> Result:
    try:
        for job in asked.jobs:
            job.check()
    except OptlmError as error:
        return _refusal(row, custom_id, error)
    body = asked.answer()
    usage = body["usage"]
    line = as_line(_record(row, custom_id, _response(row, 200, body), None))
    return Result(line, False, usage["prompt_tokens"], usage.get("completion_tokens", 0))


def _request(fields: Any, urls: Collection[str]) -> tuple[str, Any]:
    """URL and body of a row whose frame is right.

    Raises:
        RowError: it is not.
    """
    if not isinstance(fields, dict):
        raise RowError("invalid_request", f"a row is an object with {', '.join(_FIELDS)}")
    for name in fields:
        if name not in _FIELDS:
            raise RowError(
                "unknown_field", f"unknown field {name!r:.80}{did_you_mean(name, _FIELDS)}"
            )
    for name, kind, told in (
        ("custom_id", str, "a text"),
        ("url", str, "a text"),
        ("body", Mapping, "an object"),
    ):
        if not isinstance(fields.get(name), kind):
            raise RowError("invalid_request", f"{name} must be there and be {told}")
    if fields.get("method", "POST") != "POST":
        raise RowError("invalid_method", f"method is {fields['method']!r:.80}; it must be POST")
    if fields["url"] not in urls:
        near = did_you_mean(fields["url"], urls)
        raise RowError(
            "invalid_url", f"url is {fields['url']!r:.80}{near}; served are {', '.join(urls)}"
        )
    return fields["url"], fields["body"]


def _refusal(row: int, custom_id: str | None, error: Exception) -> Result:
    told = api_error(error)
    response = _response(row, told.status, told.body())
    return Result(as_line(_record(row, custom_id, response, None)), failed=True)


def _response(row: int, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{row}", "body": body}


def _record(
    row: int,
    custom_id: str | None,
    response: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{row}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
