"""`Service`: runs planned requests on an `AsyncLLM`, for as long as their callers wait."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from optlm.engine.aio import AsyncLLM
from optlm.engine.outputs import RequestOutput
from optlm.engine.params import SamplingParams
from optlm.serve.completions import Completions, PieceWriter
from optlm.serve.plan import CompletionPlan
from optlm.serve.served import Served

__all__ = ["Service", "all_of"]

T = TypeVar("T")

_AHEAD = 64  # events that the prompts of one stream may be ahead of their reader


class Service:
    """What the routes call.

    Attributes:
        engine: runs it.
        served: what it is.
    """

    def __init__(self, engine: AsyncLLM, served: Served) -> None:
        self.engine = engine
        self.served = served

    async def complete(self, plan: CompletionPlan) -> dict[str, Any]:
        """Answer a completion request whole. Cancelling aborts what runs."""
        words = self._words(plan)
        return words.response(
            await all_of([self.engine.generate(ids, plan.params) for ids in plan.prompts])
        )

    async def stream(self, plan: CompletionPlan) -> AsyncGenerator[bytes, None]:
        """Answer it as server-sent events, the last being ``[DONE]``. Closing aborts what runs."""
        words = self._words(plan)
        outputs: list[RequestOutput] = []
        parts = [
            self._stream_one(ids, plan.params, writer, outputs)
            for ids, writer in zip(plan.prompts, words.pieces(), strict=True)
        ]
        async with aclosing(parts[0] if len(parts) == 1 else _merged(parts)) as events:
            async for event in events:
                yield event
        if plan.include_usage:
            yield words.usage_event(outputs)
        yield b"data: [DONE]\n\n"

    def _words(self, plan: CompletionPlan) -> Completions:
        return Completions(
            plan, self.served, id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time())
        )

    async def _stream_one(
        self,
        ids: list[int],
        params: SamplingParams,
        writer: PieceWriter,
        outputs: list[RequestOutput],
    ) -> AsyncGenerator[bytes, None]:
        read: RequestOutput | None = None
        if params.prompt_logprobs is not None:
            # The prompt alone first; what follows finds it in the cache, and the numbers agree.
            alone = SamplingParams(
                max_tokens=0, prompt_logprobs=params.prompt_logprobs, adapter=params.adapter
            )
            read = await self.engine.generate(ids, alone)
        if event := writer.first(read):
            yield event
        async with aclosing(self.engine.stream(ids, params)) as pieces:
            async for piece in pieces:
                yield writer.piece(piece)
                if piece.result is not None:
                    outputs.append(piece.result)


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
