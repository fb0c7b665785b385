"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the status that goes with it.

This is the one place that knows which exception is which status. Nobody is told of files, stack traces or what an
exception says that was not written for clients: the log has that, under the request's id.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from jaxspec.checks import shown
from jaxspec.serving.requests import QueueFull, Stopping

log = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"
"""The header of every answer that names it; the log has the name, too, where something went wrong."""


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
RETRY_AFTER = {429: "1", 503: "2"}
"""Seconds after which these may be asked again, where nothing else is said: every such answer has the header."""


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
        given = dict(headers or {})
        if status in RETRY_AFTER:
            given.setdefault("retry-after", RETRY_AFTER[status])
        super().__init__(status, message, given)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: Exception, request_id: str = "") -> ApiError:
    """What the client is told of any exception; `request_id` is where the log has the rest."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return of_validation(error.errors()[0], error.body)
        case QueueFull():
            return ApiError(429, f"{error}; try again later", code="queue_full")
        case Stopping():
            return ApiError(503, "the server is stopping and takes no more requests", code="stopping")
        case TimeoutError():
            return timed_out()
        case StarletteHTTPException():
            return of_routing(error)
    return ApiError(500, f"the server failed to answer; {in_the_log(request_id)}", code="internal_error")


def in_the_log(request_id: str) -> str:
    """Where whoever runs the server finds what a client is not told."""
    return f"its log says why, under {request_id}" if request_id else "its log says why"


def timed_out() -> ApiError:
    """An answer that took too long. Clients that try again by themselves are asked not to: it would take as long."""
    return ApiError(
        408, "the answer took longer than this server allows", code="timeout", headers={"x-should-retry": "false"}
    )


def of_routing(error: StarletteHTTPException) -> ApiError:
    """A path or a method that there is not."""
    message = {404: "there is no such path", 405: "this path does not take this method"}.get(error.status_code)
    return ApiError(error.status_code, message or error.detail, headers=error.headers)


def of_validation(error: Mapping[str, Any], body: Any) -> ApiError:
    """One of pydantic's errors about a body, as a sentence that names the parameter."""
    kind, context = error["type"], error.get("ctx", {})
    param = path_of(error["loc"][1:], body, missing=kind == "missing")[:MAX_PARAM]
    if not param:
        return ApiError(400, "the body is missing; it must be a JSON object")
    got = f", got {shown_scalar(error.get('input'))}" if is_scalar(error.get("input")) else ""
    match kind:
        case "missing":
            return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
        case "extra_forbidden":
            return ApiError(400, f"{param} is no parameter that this server knows", param, "unknown_parameter")
        case "unsupported":
            values = " or ".join(json.dumps(each) for each in (*context["neutral"], None))
            return ApiError(
                400, f"{param} is not supported; it may only be {values}{got}", param, "unsupported_parameter"
            )
        case "union_tag_invalid" | "union_tag_not_found":
            param = ".".join(filter(None, (param, context["discriminator"].strip("'"))))
            if kind == "union_tag_not_found":
                return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
            found = f"{param} must be one of {context['expected_tags']}, got {shown_scalar(context['tag'])}"
            return ApiError(400, found, param, "unsupported_value")
    first, _, rest = error["msg"].partition(" ")
    sentence = f"{param} {rest}" if first in SUBJECTS else f"{param}: {error['msg']}"
    return ApiError(400, sentence + got, param, "invalid_type" if kind.endswith("_type") else "invalid_value")


MAX_PARAM = 200
"""Characters of a parameter's name that are repeated."""
SUBJECTS = ("Input", "String", "List", "Dictionary")
"""How pydantic's sentences begin, in place of which the parameter is named."""


def path_of(location: Sequence[str | int], body: Any, missing: bool) -> str:
    """Where in a body an error is, such as messages.0.content: pydantic's location without the names of its models,
    which may look like keys. Of all ways to read it, one whose last step leads somewhere."""
    best = max(readings(location, body, missing), key=lambda way: (way[-1:] != (None,), len(way) - way.count(None)))
    return ".".join(str(step) for step in best if step is not None)


def readings(location: Sequence[str | int], here: Any, missing: bool) -> Iterator[tuple[str | int | None, ...]]:
    """The ways to follow a location from here; None is a step that is no key. What is missing is no key of its own."""
    if not location:
        yield ()
        return
    step, *rest = location
    if isinstance(here, dict) and (step in here or (missing and not rest)):
        yield from ((step, *way) for way in readings(rest, here.get(step), missing))
    if isinstance(here, list) and isinstance(step, int) and step < len(here):
        yield from ((step, *way) for way in readings(rest, here[step], missing))
    yield from ((None, *way) for way in readings(rest, here, missing))


def is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def shown_scalar(value: Any) -> str:
    """A value as a sentence shows it."""
    return shown(value[:60] if isinstance(value, str) else value)


def add_error_handlers(app: FastAPI) -> None:
    """Answers every exception of an app in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        name = request.scope.get("state", {}).get("request_id", "")
        told = as_api_error(error, name)
        if told.code == "internal_error":
            log.error("request %s failed: %s", name, type(error).__name__)
        response = told.response()
        response.headers.setdefault(REQUEST_ID, name)  # of what nobody expected the answer leaves beside the door
        return response

    for kind in (StarletteHTTPException, RequestValidationError, QueueFull, Stopping, Exception):
        app.add_exception_handler(kind, answer)
