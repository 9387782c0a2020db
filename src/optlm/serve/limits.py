"""What a request may cost, what all of them together may, and who may ask how often.

Everything is counted before work begins, and given back when the request ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from optlm.serve.errors import ApiError
from optlm.serve.keys import Client

__all__ = ["Admission", "Cost", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a request takes at most: tokens read and written, bytes of its answer."""

    tokens: int
    answer_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one server.

    Attributes:
        body_bytes: of one request's body.
        body_seconds: in which a body must be complete.
        header_seconds: in which the head of a request must be complete.
        read_seconds: that a client may leave its stream unread.
        request_tokens, answer_bytes: of one request; beyond them it is refused (400).
        waiting_tokens, waiting_bytes: of all requests that run or wait; a request that would pass
            them is sent away for now (429).
        requests: that run or wait (429).
        connections: open at once.
    """

    body_bytes: int = 2**23
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    read_seconds: float = 60.0
    request_tokens: int = 2**18
    answer_bytes: int = 2**26
    waiting_tokens: int = 2**20
    waiting_bytes: int = 2**28
    requests: int = 1024
    connections: int = 2048

    def check(self, cost: Cost) -> None:
        """Raises: ApiError: 400, it is beyond what one request may cost."""
        for value, limit, what in (
            (cost.tokens, self.request_tokens, "tokens, prompts and outputs together"),
            (cost.answer_bytes, self.answer_bytes, "bytes in its answer"),
        ):
            if value > limit:
                raise ApiError(
                    400,
                    f"the request may take {value} {what}; the limit of one request is {limit}. "
                    "Ask for fewer prompts, choices, tokens or logprobs",
                    code="request_too_large",
                )


class Admission:
    """Counts what runs. Belongs to one event loop.

    Attributes:
        requests, tokens, answer_bytes: of all that were admitted and have not ended.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.requests = 0
        self.tokens = 0
        self.answer_bytes = 0
        self._clock = clock
        self._running: dict[str, int] = {}  # requests by client
        self._recent: dict[str, deque[float]] = {}  # when each client's were admitted

    @contextmanager
    def admit(self, cost: Cost, client: Client) -> Iterator[None]:
        """Hold room for a request while the block runs.

        Raises:
            ApiError: 400 for a request beyond what one may cost, 429 for too many of them.
        """
        self.limits.check(cost)
        self._check_room(cost)
        self._check_client(client)
        self.requests += 1
        self.tokens += cost.tokens
        self.answer_bytes += cost.answer_bytes
        self._running[client.name] = self._running.get(client.name, 0) + 1
        try:
            yield
        finally:
            self.requests -= 1
            self.tokens -= cost.tokens
            self.answer_bytes -= cost.answer_bytes
            self._running[client.name] -= 1
            if not self._running[client.name]:
                del self._running[client.name]

    def _check_room(self, cost: Cost) -> None:
        limits = self.limits
        for value, now, limit, what in (
            (1, self.requests, limits.requests, "requests"),
            (cost.tokens, self.tokens, limits.waiting_tokens, "tokens"),
            (cost.answer_bytes, self.answer_bytes, limits.waiting_bytes, "bytes of answers"),
        ):
            if now + value > limit:
                raise _later(
                    f"the server is busy: {now} {what} are under way, this request adds {value}, "
                    f"and the limit is {limit}. Try again later",
                    1,
                )

    def _check_client(self, client: Client) -> None:
        running = self._running.get(client.name, 0)
        if client.concurrent is not None and running >= client.concurrent:
            raise _later(
                f"the key {client.name!r} has {running} requests under way, its limit "
                f"is {client.concurrent}; wait for one to end",
                1,
            )
        if client.per_minute is None:
            return
        now = self._clock()
        recent = self._recent.setdefault(client.name, deque())
        while recent and recent[0] <= now - 60:
            recent.popleft()
        if len(recent) >= client.per_minute:
            wait = recent[0] + 60 - now
            raise _later(
                f"the key {client.name!r} made {len(recent)} requests in the last minute, its "
                f"limit is {client.per_minute}; try again in {wait:.0f} seconds",
                wait,
            )
        recent.append(now)


def _later(message: str, seconds: float) -> ApiError:
    headers = {"retry-after": str(max(math.ceil(seconds), 1))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
