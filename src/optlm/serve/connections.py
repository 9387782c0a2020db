"""uvicorn's HTTP protocol with bounds on what comes before a request is one.

A head must be complete in time, of bounded size and number of fields, and there are only so many
connections. uvicorn bounds none of these with httptools.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from optlm.serve.errors import ApiError
from optlm.serve.limits import Limits

__all__ = ["ABORT", "bounded_protocol"]

ABORT = "optlm.abort"  # an ASGI extension: drops the connection

MAX_HEAD = 2**15  # bytes
MAX_FIELDS = 100


_TOO_LARGE = f"the head of the request has more than {MAX_HEAD} bytes or {MAX_FIELDS} fields"


class _HeadTooLarge(Exception):
    pass


class BoundedProtocol(HttpToolsProtocol):
    limits = Limits()
    _head: int | None = 0  # bytes of the head so far; None while there is none
    _deadline: asyncio.TimerHandle | None = None
    _too_large = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.transport.close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.send_400_response(_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # An answer that nobody reads can only be dropped; closing would wait for the reader.
        self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}
        self._head = 0
        if self._deadline is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        size = sum(len(n) + len(v) for n, v in self.headers[-1:])
        self._head = (self._head or 0) + size
        if self._head > MAX_HEAD or len(self.headers) > MAX_FIELDS:
            self._too_large = True  # httptools wraps what is raised here in an error of its own
            raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._head = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        told = _TOO_LARGE if self._too_large else msg
        self._refuse(b"400 Bad Request", ApiError(400, told, code="invalid_http"))

    def _refuse(self, status: bytes, error: ApiError) -> None:
        """Answer and close; within an answer that has begun there is no place for another."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            answer = json.dumps(error.body()).encode()
            self.transport.write(
                b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (status, len(answer), answer)
            )
        self.transport.close()

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.limits.header_seconds, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if not self._head or self.transport.is_closing():  # nothing of a request has come
            self.transport.close()
            return
        told = f"the head was not complete after {self.limits.header_seconds:g} seconds"
        self._refuse(b"408 Request Timeout", ApiError(408, told))

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol class of these limits, for `uvicorn.Config(http=...)`."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
