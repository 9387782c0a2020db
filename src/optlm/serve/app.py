"""The routes: read, check, run, answer.

`assemble` makes an app of anything that has all `Routes`; `make_app` of those over an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from optlm import __version__
from optlm.serve.adapters import AdapterFolder
from optlm.serve.chat import Template, plan_chat
from optlm.serve.embeddings import plan_embedding
from optlm.serve.errors import ApiError, api_error
from optlm.serve.fields import Fields, read_fields
from optlm.serve.http import ClientGone, EventStream, JsonAnswer, read_body, unless_gone
from optlm.serve.jsonbody import parse_json
from optlm.serve.keys import ANYONE, Client, Keys
from optlm.serve.plan import CompletionPlan, plan_completion
from optlm.serve.reference import reference_page
from optlm.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    TokenizeRequest,
)
from optlm.serve.schema import describe
from optlm.serve.scoring import ScorePlan, plan_score
from optlm.serve.served import Served
from optlm.serve.service import Service
from optlm.serve.tokens import detokenize, tokenize, tokenizer_info

__all__ = ["LARGE_BODY", "Routes", "assemble", "client_of", "make_app"]

Plan = TypeVar("Plan")
Endpoint = Callable[[Request], Awaitable[Response]]

LARGE_BODY = 2**15  # bytes; reading them takes a millisecond or more


class Routes(Protocol):
    """What there is to ask; `assemble` gives it addresses."""

    async def health(self, request: Request, /) -> Response: ...
    async def ready(self, request: Request, /) -> Response: ...
    async def metrics(self, request: Request, /) -> Response: ...
    async def models(self, request: Request, /) -> Response: ...
    async def model(self, request: Request, /) -> Response: ...
    async def completions(self, request: Request, /) -> Response: ...
    async def chat(self, request: Request, /) -> Response: ...
    async def score(self, request: Request, /) -> Response: ...
    async def embeddings(self, request: Request, /) -> Response: ...
    async def tokenize(self, request: Request, /) -> Response: ...
    async def detokenize(self, request: Request, /) -> Response: ...
    async def tokenizer_info(self, request: Request, /) -> Response: ...
    async def reload_adapters(self, request: Request, /) -> Response: ...


class _EngineRoutes:
    """Endpoints over one service."""

    def __init__(
        self,
        service: Service,
        template: Template,
        keys: Keys | None,
        adapters: AdapterFolder | None,
    ) -> None:
        self._service = service
        self._template = template
        self._keys = keys
        self._adapters = adapters

    # ---- what is there -------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        error = self._service.engine.error
        if error is not None:
            raise ApiError(503, error, code="engine_dead")
        return JsonAnswer({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._service.draining:
            raise ApiError(503, "the server is ending", code="draining")
        return await self.health(request)

    async def metrics(self, request: Request) -> Response:
        self._client(request)
        return Response(self._service.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        self._client(request)
        return JsonAnswer({"object": "list", "data": self._models()})

    async def model(self, request: Request) -> Response:
        self._client(request)
        name = request.path_params["model"]
        self._service.served.adapter_of(name)
        return JsonAnswer(next(model for model in self._models() if model["id"] == name))

    # ---- work ----------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        client, plan = await self._prepare(request, CompletionRequest, plan_completion)
        return await self._run(request, plan, client, chat=False)

    async def chat(self, request: Request) -> Response:
        def plan_it(fields: ChatRequest, served: Served) -> CompletionPlan:
            return plan_chat(fields, served, self._template)

        client, plan = await self._prepare(request, ChatRequest, plan_it)
        return await self._run(request, plan, client, chat=True)

    async def score(self, request: Request) -> Response:
        def plan_it(fields: ScoreRequest, served: Served) -> ScorePlan:
            return plan_score(fields, served, self._service.admission.limits)

        client, plan = await self._prepare(request, ScoreRequest, plan_it, aside=True)
        return JsonAnswer(await unless_gone(request, self._service.score(plan, client)))

    async def embeddings(self, request: Request) -> Response:
        client, plan = await self._prepare(request, EmbeddingRequest, plan_embedding)
        return JsonAnswer(await unless_gone(request, self._service.embed(plan, client)))

    async def tokenize(self, request: Request) -> Response:
        return JsonAnswer((await self._prepare(request, TokenizeRequest, tokenize))[1])

    async def detokenize(self, request: Request) -> Response:
        return JsonAnswer((await self._prepare(request, DetokenizeRequest, detokenize))[1])

    async def tokenizer_info(self, request: Request) -> Response:
        self._client(request)
        return JsonAnswer(tokenizer_info(self._service.served))

    async def reload_adapters(self, request: Request) -> Response:
        self._client(request)
        if self._adapters is None:
            raise ApiError(400, "the server was started without --adapters", code="no_adapters")
        told = await self._adapters.reload()
        return JsonAnswer({"loaded": told.loaded, "removed": told.removed, "refused": told.refused})

    # ---- inside --------------------------------------------------------------------------------

    def _client(self, request: Request) -> Client:
        return client_of(self._keys, request)

    async def _prepare(
        self,
        request: Request,
        model: type[Fields],
        plan: Callable[[Fields, Served], Plan],
        *,
        aside: bool = False,
    ) -> tuple[Client, Plan]:
        """Read, validate and tokenize.

        Args:
            aside: on another thread, so that others go on; a large body is read there anyway.
        """
        client, limits = self._client(request), self._service.admission.limits
        raw = await read_body(request, max_bytes=limits.body_bytes, seconds=limits.body_seconds)

        def prepared() -> Plan:
            return plan(read_fields(model, parse_json(raw)), self._service.served)

        if aside or len(raw) > LARGE_BODY:
            return client, await asyncio.to_thread(prepared)
        return client, prepared()

    async def _run(
        self, request: Request, plan: CompletionPlan, client: Client, *, chat: bool
    ) -> Response:
        service = self._service
        if plan.stream:
            events = service.stream(plan, client, chat=chat)
            return await EventStream.begin(request, events, service.admission.limits.read_seconds)
        return JsonAnswer(await unless_gone(request, service.complete(plan, client, chat=chat)))

    def _models(self) -> list[dict[str, Any]]:
        served = self._service.served
        common = {"object": "model", "created": served.created, "owned_by": "optlm"}
        common["max_model_len"] = served.context
        base = {"id": served.name, **common, "root": served.name, "parent": None}
        names = sorted(served.adapters())
        return [base] + [{"id": n, **common, "root": n, "parent": served.name} for n in names]


def make_app(
    service: Service,
    *,
    template: Template,
    keys: Keys | None = None,
    adapters: AdapterFolder | None = None,
) -> FastAPI:
    """All routes over one service.

    Args:
        keys: who may ask; None lets everyone.
        adapters: the folder that `/v1/adapters/reload` looks into.
    """
    routes = _EngineRoutes(service, template, keys, adapters)
    return assemble(routes, service.metrics.answers)


def client_of(keys: Keys | None, request: Request) -> Client:
    """Who asks.

    Raises:
        ApiError: 401, no key or an unknown one.
    """
    if keys is None:
        return ANYONE
    given = [value for name, value in request.scope["headers"] if name == b"authorization"]
    return keys.client_of(given)


def assemble(routes: Routes, answers: Counter) -> FastAPI:
    """Give routes their addresses; answers are counted by status."""
    app = FastAPI(
        title="optlm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )

    async def failed(request: Request, error: Exception) -> Response:
        return _failure(request, error)

    for kind in (ClientGone, HTTPException):
        app.add_exception_handler(kind, failed)

    def add(method: str, path: str, name: str, fields: type[Any] | None = None) -> None:
        app.add_api_route(
            path,
            _guarded(getattr(routes, name), answers),
            methods=[method],
            response_model=None,
            name=name,
            openapi_extra=describe(name, fields),
        )

    add("GET", "/health", "health")
    add("GET", "/ready", "ready")
    add("GET", "/metrics", "metrics")
    add("GET", "/v1/models", "models")
    add("GET", "/v1/models/{model}", "model")
    add("POST", "/v1/completions", "completions", CompletionRequest)
    add("POST", "/v1/chat/completions", "chat", ChatRequest)
    add("POST", "/v1/score", "score", ScoreRequest)
    add("POST", "/v1/embeddings", "embeddings", EmbeddingRequest)
    add("POST", "/tokenize", "tokenize", TokenizeRequest)
    add("POST", "/detokenize", "detokenize", DetokenizeRequest)
    add("GET", "/tokenizer_info", "tokenizer_info")
    add("POST", "/v1/adapters/reload", "reload_adapters")

    @app.get("/docs", include_in_schema=False)
    def reference() -> Response:
        page = reference_page(app.openapi())
        return Response(page.html, media_type="text/html; charset=utf-8", headers=page.headers)

    return app


def _guarded(call: Endpoint, answers: Counter) -> Endpoint:
    """One request's error is its own answer, whatever it is."""

    async def endpoint(request: Request) -> Response:
        try:
            answer = await call(request)
        except Exception as error:
            answer = _failure(request, error)
        answers.labels(str(answer.status_code)).inc()
        return answer

    return endpoint


def _failure(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}"
        told = {404: f"there is nothing at {what:.200}", 405: f"{what:.200} is not allowed"}
        message = told.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    known = api_error(error)
    return JsonAnswer(known.body(), known.status, known.headers)
