"""Reading requests and writing answers: bounded bodies, server-sent events, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from optlm.serve.connections import ABORT
from optlm.serve.errors import ApiError, api_error

__all__ = ["ClientGone", "EventStream", "JsonAnswer", "read_body", "unless_gone"]

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


class JsonAnswer(Response):
    """Some JSON, or bytes that are JSON already."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        super().__init__(raw, status, headers)


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Read a body of JSON.

    Raises:
        ApiError: 415 for another content type or a compressed body, 413 for more than `max_bytes`,
            408 when it takes longer than `seconds`.
        ClientGone: the client left while it sent.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind!r:.80}; it must be 'application/json'")
    for name, plain in (("content-encoding", "identity"), ("transfer-encoding", "chunked")):
        coding = request.headers.get(name, plain).lower()
        if coding != plain:
            raise ApiError(415, f"the {name} is {coding!r:.80}; send the body as it is")
    try:
        return await asyncio.wait_for(_read(request, max_bytes), seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body was not complete after {seconds:g} seconds", headers=_CLOSE
        ) from None
    except ClientDisconnect:
        raise ClientGone from None


_CLOSE = {"connection": "close"}


async def _read(request: Request, max_bytes: int) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and int(said[:20]) > max_bytes:
        raise _too_large(f"has {said:.20} bytes", max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large("is larger", max_bytes)
    return b"".join(chunks)


def _too_large(what: str, limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body {what}; the limit is {limit} bytes, split the request",
        code="body_too_large",
        headers=_CLOSE,
    )


async def unless_gone(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """The call's result; when the client goes away first, the call is cancelled.

    Raises:
        ClientGone: it did.
    """
    work = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator, which is closed when the client goes away.

    The status is decided by the first event: what fails before it is an ordinary error answer.
    A client that reads nothing for `patience` seconds is given up.
    """

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], *, patience: float = 60.0
    ) -> None:
        super().__init__(
            None,
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            },
        )
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._patience = patience

    @classmethod
    async def begin(
        cls, request: Request, events: AsyncGenerator[bytes, None], patience: float
    ) -> EventStream:
        """Wait for the first event.

        Raises:
            ClientGone: the client left before there was one.
        """
        try:
            first = await unless_gone(request, _next(events))
        except BaseException:
            await events.aclose()
            raise
        return cls(first, events, patience=patience)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
            if writing.cancelled():  # by `_Patience`
                scope["extensions"][ABORT]["call"]()
        finally:
            writing.cancel()
            gone.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._rest.aclose()

    async def _write(self, send: Send) -> None:
        async with _Patience(self._patience) as patience:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_body(self._first))
            try:
                async for event in self._rest:
                    patience.begin()
                    await send(_body(event))
                    patience.end()
            except Exception as error:
                told = json.dumps(api_error(error).body())
                await send(_body(f"data: {told}\n\n".encode()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Cancels the task inside when something it began has not ended after `seconds`.

    One timer for the whole of a stream: a timeout around each write would cost more than the write.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> _Patience:
        self._watch()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def begin(self) -> None:
        self._since = self._loop.time()

    def end(self) -> None:
        self._since = None

    def _watch(self) -> None:
        if self._since is not None and self._loop.time() - self._since > self._seconds:
            assert self._task is not None
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds / 4, self._watch)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


def _body(event: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": event, "more_body": True}
