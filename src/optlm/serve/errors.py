"""`ApiError`: what a client is told, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optlm.errors import ContextLengthError, EngineError, OptlmError, RequestError

__all__ = ["ApiError", "about", "api_error"]

_INVALID = "invalid_value"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """A refusal or failure with its HTTP status.

    Attributes:
        param: the field at fault, if one is.
        code: stable and machine-readable.
        headers: to send along, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


@contextmanager
def about(field: str, index: int | None = None) -> Iterator[None]:
    """Say which field, and which of its items, the engine's refusals inside are about."""
    try:
        yield
    except RequestError as error:
        where = "" if index is None else f"{field}[{index}]: "
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else _INVALID
        raise ApiError(400, f"{where}{error}", param=field, code=code) from None


def api_error(error: Exception) -> ApiError:
    """What a client is told about an exception; of surprises only that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, OptlmError):
        return ApiError(400, str(error), code=_INVALID)
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
