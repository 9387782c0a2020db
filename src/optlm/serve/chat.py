"""Chats as completions, through a template that the operator gives; base models have none.

Without one a chat is written out plainly, which is what a model trained on text alone can follow:

    System text.

    User: Hello
    Assistant:
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optlm.engine.outputs import RequestOutput, StreamOutput, TokenLogprobs
from optlm.errors import RequestError
from optlm.serve.completions import usage_of
from optlm.serve.errors import ApiError, about
from optlm.serve.logprobs import TokenReports
from optlm.serve.plan import CompletionPlan, fit_prompt, sampling_of, wants_usage
from optlm.serve.requests import ChatRequest, Message
from optlm.serve.served import Served

__all__ = [
    "ChatWords", "Template", "make_template", "plain_chat", "plan_chat", "read_template",
    "read_template_text",
]  # fmt: skip

Template = Callable[[Sequence[Message]], str]
DEFAULT_TOKENS = 128
_MAX_TEMPLATE = 2**16
_ROLES = {"user": "User", "assistant": "Assistant"}
_NEXT_TURN = "\nUser:"


def plain_chat(messages: Sequence[Message]) -> str:
    """The default template."""
    system = [m.content for m in messages if m.role in ("system", "developer")]
    turns = [f"{_ROLES[m.role]}: {m.content}" for m in messages if m.role in _ROLES]
    return "\n\n".join([*system, "\n".join([*turns, "Assistant:"])])


def read_template(path: str | Path) -> Template:
    """The template of a file; see `make_template`.

    Raises:
        RequestError: jinja2 is missing, or it is no template.
        OSError: it cannot be read.
    """
    return make_template(read_template_text(path), str(path))


def read_template_text(path: str | Path) -> str:
    """What a file holds, if it may be a template.

    Raises:
        RequestError: it is too large, or not UTF-8.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        raw = file.read(_MAX_TEMPLATE + 1)
    if len(raw) > _MAX_TEMPLATE:
        raise RequestError(f"{path} has more than {_MAX_TEMPLATE} bytes; that is no chat template")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no Jinja template: {error}") from None


def make_template(text: str, name: str = "the chat template") -> Template:
    """A Jinja template, as chat templates are written: it sees `messages` and
    `add_generation_prompt`. It runs in Jinja's sandbox, and requests have no part in it.

    Args:
        name: where the text comes from, for the error.

    Raises:
        RequestError: jinja2 is missing, or it is no template.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise RequestError(
            "a chat template needs jinja2, which is not installed: pip install 'optlm[serve]'"
        ) from None
    try:
        template = ImmutableSandboxedEnvironment().from_string(text)
    except TemplateError as error:
        raise RequestError(f"{name} is no Jinja template: {error}") from None

    def render(messages: Sequence[Message]) -> str:
        given = [message.model_dump(exclude_none=True) for message in messages]
        try:
            return template.render(messages=given, add_generation_prompt=True)
        except Exception as error:  # whatever the template does, the server lives
            raise ApiError(
                400, f"the chat template refused the messages: {error}"[:500], param="messages"
            ) from None

    return render


def plan_chat(request: ChatRequest, served: Served, template: Template) -> CompletionPlan:
    """Check a chat and tokenize it.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            400, "top_logprobs goes with logprobs, which is not true", param="top_logprobs"
        )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400, "max_tokens and max_completion_tokens are the same; give one", param="max_tokens"
        )
    limit = request.max_completion_tokens
    limit = limit if request.max_tokens is None else request.max_tokens
    params = sampling_of(
        request,
        served,
        DEFAULT_TOKENS if limit is None else limit,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    if params.max_tokens == 0:
        raise ApiError(400, "max_tokens is 0; a chat needs at least 1", param="max_tokens")
    if template is plain_chat:
        params = replace(params, stop=[*params.stop, _NEXT_TURN])
    text = template(request.messages)
    served.need_tokenizer("chats are texts; use /v1/completions with token ids")
    with about("messages"):
        ids = fit_prompt(text, served, params, keep=request.truncate_prompt_tokens)
    return CompletionPlan(
        model=request.model or served.name,
        prompts=[ids],
        texts=[],
        params=params,
        logprobs=params.logprobs,  # type: ignore[arg-type]
        names_ids=bool(request.return_tokens_as_token_ids),
        stream=bool(request.stream),
        include_usage=wants_usage(request),
        priority=request.priority or 0,
    )


class ChatWords:
    """Words the answer to a chat, whole or as the `PieceWriter` of a stream."""

    def __init__(self, plan: CompletionPlan, served: Served, *, id: str, created: int) -> None:
        self._plan = plan
        self._reports = TokenReports(served.tokenizer, plan.logprobs or 0, names_ids=plan.names_ids)
        self._head = {"id": id, "created": created, "model": plan.model}
        self._begun: set[int] = set()

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [
            {
                "index": done.index,
                "message": {"role": "assistant", "content": done.text, "refusal": None},
                "logprobs": self._logprobs(done.logprobs),
                "finish_reason": done.finish_reason,
                "stop_reason": done.stop_reason,
            }
            for done in outputs[0].outputs
        ]
        kind = {"object": "chat.completion"}
        return {**self._head, **kind, "choices": choices, "usage": usage_of(outputs)}

    def pieces(self) -> list[ChatWords]:
        return [self]

    def first(self, read: RequestOutput | None) -> bytes:
        return b""

    def piece(self, piece: StreamOutput) -> bytes:
        delta: dict[str, Any] = {"content": piece.text}
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", **delta}
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return self._event([choice], None)

    def usage_event(self, outputs: Sequence[RequestOutput]) -> bytes:
        return self._event([], usage_of(outputs))

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        event = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._plan.include_usage:
            event["usage"] = usage
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def _logprobs(self, reports: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if reports is None:
            return None
        return {"content": [self._reports.entry(report) for report in reports]}
