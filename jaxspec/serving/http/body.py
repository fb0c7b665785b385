"""Reading a request's body: JSON, strictly, before any model of it is made.

What Python's parser takes beyond the standard (NaN, lone surrogates, numbers beyond a float, any depth) is refused
here, and so is a body of so many values that validating it would hold up everybody else.
"""

import email.message
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from jaxspec.serving.http.errors import ApiError

MAX_VALUES = 100_000
"""Most values (objects, lists, numbers, strings ..) of a body."""


class JsonRequest(Request):
    """A request whose body is read strictly."""

    async def json(self) -> Any:
        """The body. Raises ApiError, 400, where it is no JSON or too large a tree."""
        return parsed(await self.body())


class JsonRoute(APIRoute):
    """A route that takes JSON and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, behind the checks of this module."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None:
                check_content_type(request.headers.get("content-type"))
            return await handler(JsonRequest(request.scope, request.receive))

        return strict


def check_content_type(value: str | None) -> None:
    """Raises ApiError, 415, for what is not JSON in UTF-8."""
    header = email.message.Message()
    header["content-type"] = value or ""
    charset = header.get_param("charset") or "utf-8"
    if (
        value is None
        or header.get_content_type() != "application/json"
        or str(charset).lower() not in ("utf-8", "utf8")
    ):
        raise ApiError(415, "the body must be JSON in UTF-8, with the content-type application/json")


def parsed(body: bytes) -> Any:
    """The value of a JSON text. Raises ApiError, 400."""
    if not body.strip():
        raise ApiError(400, "the body is empty; it must be a JSON object")
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}")
    check_values(value)
    return value


def check_values(value: Any) -> None:
    """Raises ApiError, 400, for more than `MAX_VALUES` values in all, or a number that no float holds."""
    left, stack = MAX_VALUES, [value]
    while stack:
        each = stack.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        left -= len(inner)
        if left < 0:
            raise ApiError(400, f"the body has more than {MAX_VALUES} values")
        stack += inner
        if isinstance(each, float) and not math.isfinite(each):
            raise ApiError(400, "the body has a number that is out of range")
