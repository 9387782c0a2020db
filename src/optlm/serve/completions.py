"""The engine's outputs as OpenAI's text completions: `Completions`, which knows no HTTP.

    plan = plan_completion(read_fields(CompletionRequest, body), served)
    outputs = llm.generate(plan.prompts, plan.params)                 # or AsyncLLM, one by one
    Completions(plan, served, id="cmpl-1", created=0).response(outputs)

Streamed pieces join to the very same texts, finish reasons, log-probabilities and usage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optlm.engine.outputs import Completion, RequestOutput, StreamOutput, TokenLogprobs
from optlm.serve.logprobs import TokenReports
from optlm.serve.plan import CompletionPlan
from optlm.serve.served import Served

__all__ = ["Completions", "usage_of"]


def usage_of(
    outputs: Sequence[RequestOutput], completion_tokens: int | None = None
) -> dict[str, Any]:
    """Tokens read and written; prompts count once however many choices they have."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    if completion_tokens is None:
        completion_tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
    }


class Completions:
    """Words the answer to one planned request."""

    def __init__(self, plan: CompletionPlan, served: Served, *, id: str, created: int) -> None:
        self._plan = plan
        self._tokenizer = served.tokenizer
        self._head = {
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": plan.model,
        }

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer, from one output a prompt, in order."""
        choices = [
            self._choice(prompt, output, completion)
            for prompt, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": usage_of(outputs)}

    def pieces(self) -> list[PieceWriter]:
        """One writer a prompt, for its increments."""
        return [PieceWriter(self, index) for index in range(len(self._plan.prompts))]

    def usage_event(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last event of a stream whose client asked for the usage."""
        return _event({**self._head, "choices": [], "usage": usage_of(outputs)})

    # ---- inside --------------------------------------------------------------------------------

    def index(self, prompt: int, choice: int) -> int:
        return prompt * self._plan.params.n + choice

    def reports(self) -> TokenReports | None:
        plan = self._plan
        if plan.logprobs is None:
            return None
        return TokenReports(self._tokenizer, plan.logprobs, names_ids=plan.names_ids)

    def _choice(self, prompt: int, output: RequestOutput, done: Completion) -> dict[str, Any]:
        plan = self._plan
        text, token_ids = done.text, done.token_ids
        logprobs: list[TokenLogprobs | None] = list(done.logprobs or ())
        if plan.echo:
            text = plan.texts[prompt] + text
            token_ids = output.prompt_token_ids + token_ids
            logprobs = [*(output.prompt_logprobs or ()), *logprobs]
        reports = self.reports()
        choice: dict[str, Any] = {
            "index": self.index(prompt, done.index),
            "text": text,
            "logprobs": None if reports is None else reports.report(token_ids, logprobs),
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
        }
        if plan.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.prompt_report(output)
        return choice

    def prompt_report(self, output: RequestOutput) -> dict[str, Any]:
        plan = self._plan
        assert plan.prompt_logprobs is not None
        reports = TokenReports(self._tokenizer, plan.prompt_logprobs, names_ids=plan.names_ids)
        return reports.report(output.prompt_token_ids, output.prompt_logprobs or [])

    @property
    def plan(self) -> CompletionPlan:
        return self._plan

    @property
    def head(self) -> dict[str, Any]:
        return self._head


class PieceWriter:
    """Turns the increments of one prompt into events. The common one is put together by hand."""

    def __init__(self, completions: Completions, prompt: int) -> None:
        plan = completions.plan
        self._completions = completions
        self._prompt = prompt
        self._reports = [completions.reports() for _ in range(plan.params.n)]
        head = json.dumps(completions.head, ensure_ascii=False)[:-1]
        end = ',"usage":null' if plan.include_usage else ""
        self._starts = [
            f'data: {head}, "choices":[{{"index":{completions.index(prompt, choice)},"text":'
            for choice in range(plan.params.n)
        ]
        self._end = f"]{end}}}\n\n"

    def first(self, read: RequestOutput | None) -> bytes:
        """What stands before the first tokens: the echoed prompt and its log-probabilities.

        Args:
            read: the prompt's own output where its log-probabilities are wanted.
        """
        plan = self._completions.plan
        if not plan.echo and (read is None or plan.prompt_logprobs is None):
            return b""
        text = plan.texts[self._prompt] if plan.echo else ""
        events = []
        for choice, reports in enumerate(self._reports):
            more = ""
            if plan.prompt_logprobs is not None and read is not None:
                more = f',"prompt_logprobs":{json.dumps(self._completions.prompt_report(read))}'
            logprobs = None
            if plan.echo and reports is not None and read is not None:
                logprobs = reports.report(read.prompt_token_ids, read.prompt_logprobs or [])
            events.append(self._event(choice, text, logprobs, None, None, more))
        return b"".join(events)

    def piece(self, piece: StreamOutput) -> bytes:
        """The event of an increment, also of tokens whose text comes later."""
        reports = self._reports[piece.index]
        logprobs = None
        if reports is not None and piece.token_ids:
            logprobs = reports.report(piece.token_ids, piece.logprobs or [])
        return self._event(
            piece.index, piece.text, logprobs, piece.finish_reason, piece.stop_reason, ""
        )

    def _event(
        self,
        choice: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
        more: str,
    ) -> bytes:
        reported = "null" if logprobs is None else json.dumps(logprobs)
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        stop = "" if finish_reason is None else f',"stop_reason":{json.dumps(stop_reason)}'
        return (
            f'{self._starts[choice]}{json.dumps(text)},"logprobs":{reported},'
            f'"finish_reason":{reason}{stop}{more}}}{self._end}'
        ).encode()


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values).encode() + b"\n\n"
