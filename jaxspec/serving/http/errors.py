"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the status that goes with it.

This is the one place that knows which exception is which status. Nobody is told of files or stack traces.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from jaxspec.serving.requests import QueueFull, Stopping


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
"""OpenAI's types by status; below 500 the others are `invalid_request_error`, from there on `server_error`."""


class ApiError(HTTPException):
    """A refusal, raised wherever it is noticed."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of any exception."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return ApiError(400, str(error.errors()[0]["msg"]))
        case QueueFull():
            return ApiError(429, f"{error}; try again later", code="queue_full", headers={"Retry-After": "1"})
        case Stopping():
            return ApiError(503, "the server is stopping and takes no more requests", code="stopping")
        case StarletteHTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed to answer; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Answers every exception of an app in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        del request
        return as_api_error(error).response()

    for kind in (StarletteHTTPException, RequestValidationError, QueueFull, Stopping, Exception):
        app.add_exception_handler(kind, answer)
