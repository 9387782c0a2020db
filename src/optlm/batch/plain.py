"""Plain rows: a prompt in, a text out."""

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
from optlm.engine.outputs import Completion, TokenLogprobs
from optlm.engine.params import SamplingParams
from optlm.errors import ContextLengthError, RequestError, TokenizerError

__all__ = ["PlainRows"]


class PlainRows:
    """A `Starter` of rows that are a text, a list of token ids, or an object with a prompt."""

    def __init__(self, llm: LLM, settings: BatchSettings) -> None:
        self._llm = llm
        self._settings = settings
        self._params = settings.params()

    def start(self, row: int, content: bytes | RowFault) -> Work | Result:
        kept: dict[str, Any] = {}
        try:
            if isinstance(content, RowFault):
                raise RowError(content.code, content.message)
            fields = parse_json(content)
            if isinstance(fields, dict):
                kept = {name: fields[name] for name in self._settings.keep if name in fields}
            prompt, params = self._read(row, fields)
            job = self._llm.submit(prompt, params)
        except RowError as error:
            return self._failure(row, kept, error.fault)
        except ContextLengthError as error:
            return self._failure(row, kept, RowFault("context_length_exceeded", str(error)))
        except (RequestError, TokenizerError) as error:
            return self._failure(row, kept, RowFault("invalid_request", str(error)))
        return Work([job], lambda: self._success(row, kept, job))

    def _read(self, row: int, fields: Any) -> tuple[Any, SamplingParams]:
        """The prompt and the parameters of a row."""
        params, own = self._params, None
        name = self._settings.prompt_field
        if isinstance(fields, dict):
            if name not in fields:
                raise RowError("missing_prompt", f"the row has no field {name!r:.80}", name)
            prompt, own = fields[name], fields.get("params")
        else:
            prompt = fields
        if not isinstance(prompt, (str, list)):
            raise RowError("invalid_request", "a prompt is a text or a list of token ids", name)
        if own is not None:
            if not isinstance(own, Mapping):
                raise RowError("invalid_request", "params must be an object", "params")
            params = SamplingParams(**{**self._settings.sampling, **_own_params(own)})
        if params.seed is None and not params.is_greedy:
            params = dataclasses.replace(params, seed=row_seed(self._settings.seed, row))
        return prompt, params

    def _success(self, row: int, kept: dict[str, Any], job: Generation) -> Result:
        if job.error is not None:
            return self._failure(row, kept, RowFault("engine_error", job.error))
        output = job.output()
        prompt_tokens = len(output.prompt_token_ids)
        completion_tokens = sum(len(done.token_ids) for done in output.outputs)
        record = _head(row, kept)
        texts = [_completion(done) for done in output.outputs]
        record |= texts[0] if len(texts) == 1 else {"outputs": texts}
        record["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        if output.num_truncated_tokens:
            record["num_truncated_tokens"] = output.num_truncated_tokens
        if output.seed is not None:
            record["seed"] = output.seed
        return Result(as_line(record), False, prompt_tokens, completion_tokens)

    def _failure(self, row: int, kept: dict[str, Any], fault: RowFault) -> Result:
        error = {"code": fault.code, "message": fault.message, "param": fault.param}
        return Result(as_line({**_head(row, kept), "error": error}), failed=True)


def _own_params(own: Mapping[str, Any]) -> dict[str, Any]:
    """A row's ``params``; the ids of a logit bias are texts in JSON."""
    values = dict(own)
    bias = values.get("logit_bias")
    if isinstance(bias, dict):
        try:
            values["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise RowError("invalid_request", "logit_bias maps token ids to numbers") from None
    return values


def _head(row: int, kept: dict[str, Any]) -> dict[str, Any]:
    return {"row": row, "input": kept} if kept else {"row": row}


def _completion(done: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {"text": done.text, "finish_reason": done.finish_reason}
    if done.stop_reason is not None:
        record["stop_reason"] = done.stop_reason
    if done.logprobs is not None:
        record["tokens"] = [_token(entry) for entry in done.logprobs]
    return record


def _token(entry: TokenLogprobs) -> dict[str, Any]:
    """One generated token; rounded as `optlm generate --json` rounds."""
    top = [{"id": token, "logprob": round(value, 6)} for token, value in entry.top().items()]
    return {"id": entry.token_id, "logprob": round(entry.logprob, 6), "top": top}
