"""`ApiError`: what a client is told, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from optlm.errors import ContextLengthError, EngineError, OptlmError, RequestError

__all__ = ["ApiError", "api_error"]

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


def api_error(error: Exception) -> ApiError:
    """What a client is told about an exception; of surprises only that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=_field_of(str(error)), code="invalid_value")
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, OptlmError):
        return ApiError(400, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


def _field_of(message: str) -> str | None:
    """The engine speaks of prompts by the name that the API has for them too."""
    return "prompt" if "prompt" in message or message.startswith("the text") else None
