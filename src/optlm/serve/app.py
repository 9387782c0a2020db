"""The routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from optlm import __version__
from optlm.serve.errors import ApiError, api_error
from optlm.serve.fields import read_fields
from optlm.serve.http import ClientGone, EventStream, JsonAnswer, read_json, unless_gone
from optlm.serve.plan import plan_completion
from optlm.serve.requests import CompletionRequest
from optlm.serve.service import Service

__all__ = ["make_app"]

MAX_BODY = 2**23  # bytes
BODY_SECONDS = 30.0
PATIENCE = 60.0  # seconds that a client may read nothing of its stream


def make_app(service: Service) -> FastAPI:
    """All routes over one service."""
    app = FastAPI(title="optlm", version=__version__, redoc_url=None)
    app.add_exception_handler(Exception, _failed)
    for kind in (ApiError, ClientGone, HTTPException):
        app.add_exception_handler(kind, _failed)

    @app.get("/health")
    async def health() -> Response:
        error = service.engine.error
        if error is not None:
            return _answer(ApiError(503, error, code="engine_dead"))
        return JsonAnswer({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return await health()

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonAnswer({"object": "list", "data": _models(service)})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_json(request, max_bytes=MAX_BODY, seconds=BODY_SECONDS)
        try:
            plan = plan_completion(read_fields(CompletionRequest, body), service.served)
            if plan.stream:
                return await EventStream.begin(service.stream(plan), PATIENCE)
            return JsonAnswer(await unless_gone(request, service.complete(plan)))
        except ClientGone:
            raise
        except Exception as error:
            raise api_error(error) from error

    return app


def _models(service: Service) -> list[dict[str, Any]]:
    served = service.served
    common = {"object": "model", "created": served.created, "owned_by": "optlm"}
    base = {"id": served.name, **common, "max_model_len": served.context}
    return [base] + [
        {"id": name, **common, "root": name, "parent": served.name, "max_model_len": served.context}
        for name in served.adapters()
    ]


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}"
        told = {404: f"there is nothing at {what:.200}", 405: f"{what:.200} is not allowed"}
        message = told.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return _answer(api_error(error))


def _answer(error: ApiError) -> Response:
    return JsonAnswer(error.body(), error.status, error.headers)
