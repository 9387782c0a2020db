"""`Front`: the routes of the server, each passed on to a replica.

Keys, sizes of bodies and clients that leave are looked at here; what a request means is the
replica's to say. A replica that is lost before it has begun to answer costs a client nothing:
another one is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError, RayError
from starlette.requests import Request
from starlette.responses import Response

from optlm.serve.adapters import Reload
from optlm.serve.app import LARGE_BODY, client_of
from optlm.serve.cluster.beginnings import beginnings
from optlm.serve.cluster.replica import Head, Whole
from optlm.serve.errors import ApiError
from optlm.serve.http import EventStream, JsonAnswer, read_body, unless_gone
from optlm.serve.keys import Client, Keys
from optlm.serve.limits import Admission, Cost, Limits

__all__ = ["Front"]

_TRIES = 3  # replicas that a request is given to, one after another
_TAKEN = 30.0  # seconds in which a replica must have taken a request
_TOLD = 5.0  # seconds for what must not take long: health, metrics


class Front:
    """`Routes` over the replicas of a deployment.

    Args:
        handle: Ray Serve's, of a deployment of `Replica`.
        limits: those of one replica, but that requests are counted here, of all.
    """

    def __init__(self, handle: Any, keys: Keys | None, limits: Limits) -> None:
        self.draining = False
        self.answers = Counter(
            "optlm:http_responses", "Answers by status", ["status"], registry=None
        )
        self._stream = handle.options(stream=True)
        self._handle = handle
        self._keys = keys
        self._admission = Admission(limits)

    # ---- what is there -------------------------------------------------------------------------

    async def health(self, request: Request, /) -> Response:
        return await self._answer(request, self._parts(request, [], b"", _TOLD))

    async def ready(self, request: Request, /) -> Response:
        if self.draining:
            raise ApiError(503, "the server is ending", code="draining")
        return await self.health(request)

    async def metrics(self, request: Request, /) -> Response:
        client_of(self._keys, request)
        told = [whole for whole in await self._all("GET", "/metrics") if isinstance(whole, Whole)]
        registry = CollectorRegistry()
        registry.register(_Pages([(whole.replica, whole.body.decode()) for whole in told]))
        registry.register(self.answers)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def _read(self, request: Request, /) -> Response:
        client_of(self._keys, request)
        return await self._answer(request, self._parts(request, [], b""))

    models = model = tokenizer_info = _read

    # ---- work ----------------------------------------------------------------------------------

    async def _work(self, request: Request, /) -> Response:
        client, limits = client_of(self._keys, request), self._admission.limits
        body = await read_body(request, max_bytes=limits.body_bytes, seconds=limits.body_seconds)
        if len(body) > LARGE_BODY:
            names = await asyncio.to_thread(beginnings, body)
        else:
            names = beginnings(body)
        parts = self._admitted(client, self._parts(request, names, body))
        return await self._answer(request, parts)

    completions = chat = score = embeddings = _work

    async def _tokens(self, request: Request, /) -> Response:
        client_of(self._keys, request)
        limits = self._admission.limits
        body = await read_body(request, max_bytes=limits.body_bytes, seconds=limits.body_seconds)
        return await self._answer(request, self._parts(request, [], body))

    tokenize = detokenize = _tokens

    async def reload_adapters(self, request: Request, /) -> Response:
        client_of(self._keys, request)
        told = await self.reload()
        return JsonAnswer({"loaded": told.loaded, "removed": told.removed, "refused": told.refused})

    async def reload(self) -> Reload:
        """Have every replica look for new adapters; what came of it in any of them.

        Raises:
            ApiError: a replica has not done so.
        """
        told = Reload()
        for whole in await self._all("POST", "/v1/adapters/reload"):
            if not isinstance(whole, Whole):
                raise _failure(whole)
            answer = json.loads(whole.body)
            if whole.head.status != 200:
                error = answer["error"]
                raise ApiError(whole.head.status, error["message"], code=error["code"])
            told.loaded = sorted({*told.loaded, *answer["loaded"]})
            told.removed = sorted({*told.removed, *answer["removed"]})
            told.refused |= answer["refused"]
        return told

    async def close(self) -> None:
        """Nothing is open."""

    # ---- inside --------------------------------------------------------------------------------

    async def _answer(self, request: Request, parts: _Parts) -> Response:
        try:
            head = await unless_gone(request, _next(parts))
            assert isinstance(head, Head)
            if any(value.startswith(b"text/event-stream") for _, value in head.headers):
                patience = self._admission.limits.read_seconds
                return await EventStream.begin(request, _bodies(parts), patience)
            body = b"".join(await unless_gone(request, _rest(parts)))
        except BaseException:
            await parts.aclose()
            raise
        answer = Response(body, head.status)
        answer.raw_headers = head.headers
        return answer

    async def _admitted(self, client: Client, parts: _Parts) -> _Parts:
        async with aclosing(parts):
            with self._admission.admit(Cost(tokens=0), client):
                async for part in parts:
                    yield part

    async def _parts(
        self, request: Request, names: Sequence[bytes], body: bytes, seconds: float = _TAKEN
    ) -> _Parts:
        """What a replica answers; another one is asked if it is lost before it has begun to.

        Raises:
            ApiError: 503, it was lost on the way, or none took the request in `seconds`.
        """
        for left in reversed(range(_TRIES)):
            begun = False
            asked = self._ask(seconds, names, request.method, request.scope["path"], body)
            try:
                async with aclosing(asked) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except RayError as error:
                if begun or not left or not isinstance(error, RayActorError):
                    raise _failure(error) from error

    async def _ask(self, seconds: float, *asked: Any) -> _Parts:
        response = self._stream.answer.remote(*asked)
        ended = False
        try:
            await asyncio.wait_for(anext(response), seconds)
            async for part in response:
                yield part
            ended = True
        except asyncio.TimeoutError:
            raise ApiError(
                503, f"no replica took the request within {seconds:g} seconds", code="no_replica"
            ) from None
        finally:
            if not ended:
                response.cancel()

    async def _all(self, method: str, path: str) -> list[Any]:
        """What every replica answers, or the error that one failed with."""
        asked = self._handle.broadcast("whole", method, path)
        try:
            told: list[Any] = await asked.results_async(timeout_s=_TOLD, return_exceptions=True)
        except TimeoutError:
            raise ApiError(503, "a replica does not answer", code="no_replica") from None
        return told


_Parts = AsyncGenerator[Head | bytes, None]


async def _next(parts: _Parts) -> Head | bytes:
    return await anext(parts)


async def _rest(parts: _Parts) -> list[bytes]:
    return [part async for part in _bodies(parts)]


async def _bodies(parts: _Parts) -> AsyncGenerator[bytes, None]:
    async with aclosing(parts):
        async for part in parts:
            assert isinstance(part, bytes)
            yield part


def _failure(error: Exception) -> ApiError:
    if isinstance(error, RayActorError):
        return ApiError(
            503, "the replica that worked on the request was lost; try again", code="replica_lost"
        )
    return ApiError(500, f"the replica failed: {type(error).__name__}", code="internal_error")


class _Pages(Collector):
    """The metrics of all replicas, each with the replica's name as a label."""

    def __init__(self, pages: Sequence[tuple[str, str]]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages:
            for family in text_string_to_metric_families(page):
                if family.name == "optlm:http_responses":
                    continue  # the front counts its own
                known = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    known.samples.append(sample._replace(labels=labels))
        return families.values()
