"""`Service`: runs planned requests on an `AsyncLLM`, for as long as their callers wait."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from optlm.engine.aio import AsyncLLM
from optlm.engine.llm import LLM
from optlm.engine.outputs import RequestOutput, StreamOutput
from optlm.engine.params import SamplingParams
from optlm.serve.adapters import AdapterFolder
from optlm.serve.chat import ChatWords
from optlm.serve.completions import Completions
from optlm.serve.embeddings import EmbeddingPlan, embedding_answer
from optlm.serve.keys import Client
from optlm.serve.limits import Admission, Limits
from optlm.serve.metrics import Metrics, Watch
from optlm.serve.plan import CompletionPlan
from optlm.serve.scoring import ScorePlan, score
from optlm.serve.served import Served

__all__ = ["Service", "all_of", "put_to_service"]

T = TypeVar("T")

_LARGE_ANSWER = 2**18  # bytes
_AHEAD = 64  # events that the prompts of one stream may be ahead of their reader


class _Writer(Protocol):
    """Turns the increments of one prompt into events."""

    def first(self, read: RequestOutput | None) -> bytes: ...
    def piece(self, piece: StreamOutput) -> bytes: ...


class Service:
    """What the routes call: every call is admitted first and counted.

    Attributes:
        engine: runs it.
        served: what it is.
    """

    def __init__(self, engine: AsyncLLM, served: Served, limits: Limits) -> None:
        self.engine = engine
        self.served = served
        self.admission = Admission(limits)
        self.metrics = Metrics(engine, self.admission, served.name)
        self.draining = False

    async def complete(self, plan: CompletionPlan, client: Client, *, chat: bool = False) -> bytes:
        """Answer a completion or chat whole, as JSON. Cancelling aborts what runs."""
        cost = plan.cost(self.served.context)
        with self.admission.admit(cost, client):
            watch = Watch(self.metrics)
            calls = [
                self.engine.generate(ids, params, priority=plan.priority)
                for ids, params in zip(plan.prompts, _params(plan), strict=True)
            ]
            outputs = await all_of(calls)
            watch.done(outputs)
            words = self._words(plan, chat)
            if cost.answer_bytes > _LARGE_ANSWER:  # wording it must not hold up the others
                return await asyncio.to_thread(_worded, words, outputs)
            return _worded(words, outputs)

    async def stream(
        self, plan: CompletionPlan, client: Client, *, chat: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """Answer it as server-sent events, the last being ``[DONE]``. Closing aborts what runs."""
        with self.admission.admit(plan.cost(self.served.context), client):
            watch, words = Watch(self.metrics), self._words(plan, chat)
            outputs: dict[int, RequestOutput] = {}
            writers: Sequence[_Writer] = words.pieces()
            parts = [
                self._stream_one(index, plan, params, writer, outputs, watch)
                for index, (params, writer) in enumerate(zip(_params(plan), writers, strict=True))
            ]
            async with aclosing(parts[0] if len(parts) == 1 else _merged(parts)) as events:
                async for event in events:
                    yield event
            ordered = [outputs[index] for index in range(len(parts))]
            watch.done(ordered)
            if plan.include_usage:
                yield words.usage_event(ordered)
            yield b"data: [DONE]\n\n"

    async def score(self, plan: ScorePlan, client: Client) -> dict[str, Any]:
        with self.admission.admit(plan.cost, client):
            return await score(plan, self.engine, self.served)

    async def embed(self, plan: EmbeddingPlan, client: Client) -> dict[str, Any]:
        request = plan.request
        with self.admission.admit(plan.cost, client):
            calls = [
                self.engine.embed(
                    ids,
                    pooling=request.pooling,
                    adapter=plan.adapter,
                    priority=request.priority or 0,
                )
                for ids in plan.inputs
            ]
            return embedding_answer(plan, await all_of(calls))

    def _words(self, plan: CompletionPlan, chat: bool) -> Completions | ChatWords:
        made, kind = (ChatWords, "chatcmpl") if chat else (Completions, "cmpl")
        return made(plan, self.served, id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()))

    async def _stream_one(
        self,
        index: int,
        plan: CompletionPlan,
        params: SamplingParams,
        writer: _Writer,
        outputs: dict[int, RequestOutput],
        watch: Watch,
    ) -> AsyncGenerator[bytes, None]:
        ids, read = plan.prompts[index], None
        if params.prompt_logprobs is not None:
            # The prompt alone first; what follows finds it in the cache, and the numbers agree.
            alone = SamplingParams(
                max_tokens=0, prompt_logprobs=params.prompt_logprobs, adapter=params.adapter
            )
            read = await self.engine.generate(ids, alone, priority=plan.priority)
            params = replace(params, prompt_logprobs=None)
        before = writer.first(read) if read is None else await asyncio.to_thread(writer.first, read)
        if before:
            yield before
        async with aclosing(self.engine.stream(ids, params, priority=plan.priority)) as pieces:
            async for piece in pieces:
                watch.first_token()
                yield writer.piece(piece)
                if piece.result is not None:
                    outputs[index] = piece.result
                    if read is not None:
                        cached = read.num_cached_tokens
                        outputs[index] = replace(piece.result, num_cached_tokens=cached)


def put_to_service(
    llm: LLM, name: str, adapters: Path | None, limits: Limits
) -> tuple[Service, AdapterFolder | None]:
    """Start an engine on a thread of its own, which `Service.engine.close` ends.

    Args:
        name: what clients call the model.
        adapters: folder of adapters, which are loaded by the first `AdapterFolder.reload`.
    """
    engine = AsyncLLM(llm)
    folder = None if adapters is None else AdapterFolder(adapters, engine)
    names = None if folder is None else folder.names
    return Service(engine, Served.of(llm, name, int(time.time()), names), limits), folder


def _worded(words: Completions | ChatWords, outputs: Sequence[RequestOutput]) -> bytes:
    return json.dumps(words.response(outputs)).encode()


def _params(plan: CompletionPlan) -> list[SamplingParams]:
    return [plan.params] * len(plan.prompts)


async def all_of(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls, in order; when one fails, or the caller leaves, none goes on."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _merged(parts: Sequence[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Events of several streams as they come; a reader who is slow holds them all up."""
    events: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(_AHEAD)

    async def forward(part: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(part):
                async for event in part:
                    await events.put(event)
            await events.put(None)
        except Exception as error:
            await events.put(error)

    tasks = [asyncio.ensure_future(forward(part)) for part in parts]
    try:
        left = len(tasks)
        while left:
            event = await events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
