"""Rows in OpenAI's batch format: a request to the server in, its response out.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
    {"id": "batch_req_0", "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}

The server's own code reads the body and words the response. What would differ from run to run does
not: ids have the number of the row, `created` is 0, and how many tokens came from the cache is left
out. A body that samples without a seed gets that of its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optlm.batch.inputs import RowFault
from optlm.batch.ledger import Result
from optlm.batch.lines import RowError, as_line, parse_json
from optlm.batch.settings import BatchSettings, row_seed
from optlm.batch.work import Work
from optlm.engine.generation import Generation
from optlm.engine.llm import LLM
from optlm.errors import OptlmError, did_you_mean
from optlm.serve.completions import Completions
from optlm.serve.errors import ApiError, api_error
from optlm.serve.fields import read_fields
from optlm.serve.plan import CompletionPlan, plan_completion
from optlm.serve.requests import CompletionRequest
from optlm.serve.served import Served

__all__ = ["OpenAIRows"]

_FIELDS = ("custom_id", "method", "url", "body")
_URLS = ("/v1/completions",)


class OpenAIRows:
    """A `Starter` of rows that are requests."""

    def __init__(self, llm: LLM, settings: BatchSettings) -> None:
        self._llm = llm
        self._seed = settings.seed
        self._served = Served.of(llm, settings.model_name, 0)

    def start(self, row: int, content: bytes | RowFault) -> Work | Result:
        custom_id: str | None = None
        try:
            if isinstance(content, RowFault):
                raise RowError(content.code, content.message)
            fields = parse_json(content)
            if isinstance(fields, dict) and isinstance(fields.get("custom_id"), str):
                custom_id = fields["custom_id"]
            plan = self._plan(row, _body(fields))
            jobs = self._submit(plan)
        except RowError as error:
            told = {"code": error.fault.code, "message": error.fault.message}
            return Result(as_line(_record(row, custom_id, None, told)), failed=True)
        except (ApiError, OptlmError) as error:
            return _refusal(row, custom_id, error)
        return Work(jobs, lambda: self._finish(row, custom_id, plan, jobs))

    def _plan(self, row: int, body: Any) -> CompletionPlan:
        plan = plan_completion(read_fields(CompletionRequest, body), self._served)
        if plan.stream:
            raise ApiError(
                400, "rows are not streamed; leave stream out", param="stream", code="invalid_value"
            )
        if plan.params.seed is None and not plan.params.is_greedy:
            params = dataclasses.replace(plan.params, seed=row_seed(self._seed, row))
            plan = dataclasses.replace(plan, params=params)
        return plan

    def _submit(self, plan: CompletionPlan) -> list[Generation]:
        """Queue all prompts of a row, or none."""
        jobs: list[Generation] = []
        try:
            jobs += [self._llm.submit(ids, plan.params) for ids in plan.prompts]
        except BaseException:
            for job in jobs:
                self._llm.abort(job)
            raise
        return jobs

    def _finish(
        self, row: int, custom_id: str | None, plan: CompletionPlan, jobs: list[Generation]
    ) -> Result:
        try:
            for job in jobs:
                job.check()
        except OptlmError as error:
            return _refusal(row, custom_id, error)
        words = Completions(plan, self._served, id=f"cmpl-{row}", created=0)
        body = words.response([job.output() for job in jobs])
        usage = body["usage"]
        usage.pop("prompt_tokens_details", None)
        line = as_line(_record(row, custom_id, _response(row, 200, body), None))
        return Result(line, False, usage["prompt_tokens"], usage["completion_tokens"])


def _body(fields: Any) -> Any:
    """The body of a row whose frame is right.

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
    if fields["url"] not in _URLS:
        near = did_you_mean(fields["url"], _URLS)
        raise RowError(
            "invalid_url", f"url is {fields['url']!r:.80}{near}; served are {', '.join(_URLS)}"
        )
    return fields["body"]


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
