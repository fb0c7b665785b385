"""What stands between a connection and the app: the key, how many, how much, how long.

Plain ASGI, in this order from the outside: `RequireKey`, `Admit`, `LimitBody`. Below them `limited_protocol` gives a
connection so long to say what it wants.
"""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import MutableMapping
from typing import Any

import h11
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import EngineSettings

WITHOUT_KEY = ("/health",)
"""Paths that anybody may ask: whether the process lives, and nothing else."""
ALWAYS_ANSWERED = ("/health", "/ready", "/metrics")
"""Paths that cost next to nothing: they are answered while the server stops, and not counted."""
RETRY = {"retry-after": "2"}
SPARE = 64


def add_limits(app: FastAPI, settings: HttpSettings, gate: "Gate") -> None:
    """Puts the limits around an app."""
    app.add_middleware(LimitBody, settings.max_body_bytes, settings.body_timeout)
    app.add_middleware(Admit, gate)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, settings.api_key)


class RequireKey:
    """Lets a request pass that carries the key: as `Authorization: Bearer KEY`, or as the password of Basic
    authentication, which is what a browser can do with the web page."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in WITHOUT_KEY):
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif hmac.compare_digest(given_key(scope), self.key):
            await self.app(scope, receive, send)
        else:
            browser = "text/html" in Headers(scope=scope).get("accept", "")
            challenge = {"www-authenticate": 'Basic realm="jaxspec"' if browser else "Bearer"}
            wrong = ApiError(401, "the API key is wrong or missing", code="invalid_api_key", headers=challenge)
            await wrong.response()(scope, receive, send)


def given_key(scope: Scope) -> bytes:
    """The key that a request carries; nothing where it carries none."""
    scheme, _, credentials = Headers(scope=scope).get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class Gate:
    """How many requests are inside, how many may be, and whether any more are let in.

    Attributes:
      limit: most requests inside, bodies that are still being read included: what bounds the memory they take.
      inside: requests that were let in and are not answered to their end.
      closed: the server is stopping. Whoever is inside stays.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.inside, self.closed = limit, 0, False

    @classmethod
    def of(cls, settings: EngineSettings) -> "Gate":
        """As many as an engine answers and lets wait, and some whose prompts are being read or whose answers are on
        their way."""
        return cls(settings.max_num_seqs + settings.max_queued_requests + SPARE)


class Admit:
    """Counts the requests inside a `Gate`; those that it does not let in are answered with 503 or 429."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self.app(scope, receive, send)
            return
        if self.gate.closed:
            await stopping().response()(scope, receive, send)
            return
        if self.gate.inside >= self.gate.limit:
            message = f"{self.gate.inside} requests are here already; try again later"
            await ApiError(429, message, code="queue_full", headers=RETRY).response()(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self.gate.inside += 1
        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:  # the server ends without waiting for the engine any longer
            if not self.gate.closed:
                raise
            if not begun:
                await stopping("the server is stopping and has ended this answer").response()(scope, receive, send)
        finally:
            self.gate.inside -= 1


def stopping(message: str = "the server is stopping and takes no more requests") -> ApiError:
    """The refusal of a server that has been told to end."""
    return ApiError(503, message, code="stopping", headers=RETRY)


class LimitBody:
    """Reads a request's body before the app sees it: so many bytes (else 413) in so many seconds (else 408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self.read(scope, receive)
        except TimeoutError:
            slow = ApiError(
                408,
                f"the body did not arrive within {self.seconds:g} seconds",
                code="body_timeout",
                headers={"connection": "close"},
            )
            await slow.response()(scope, receive, send)
        except ApiError as too_large:
            await too_large.response()(scope, receive, send)
        except ConnectionError:
            return
        else:
            await self.app(scope, replayed(body, receive), send)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        too_large = ApiError(413, f"the body has more than {self.max_bytes} bytes", code="body_too_large")
        said = Headers(scope=scope).get("content-length", "")
        if said.isdecimal() and int(said) > self.max_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """What the app reads instead: the whole body at once, then whatever else comes (that the client has gone)."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return again


def limited_protocol(header_seconds: float, rest_seconds: float = 10.0) -> type[H11Protocol]:
    """uvicorn's protocol for connections that may be hostile: a request's headers must be there `header_seconds` after
    its first byte (after the connection, for the first request), else 408 and the end. Whoever was answered before its
    body had arrived (413, 401) has `rest_seconds` to send the rest, which is thrown away: closing at once would take
    the answer away from a client that reads only after it has written."""

    class LimitedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        awaited: str | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore[bad-override]
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.await_only(None)
            super().connection_lost(exc)

        def watch(self) -> None:
            their_state = self.conn.their_state
            if their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
                self.await_only("headers", header_seconds)
            elif their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete:
                self.await_only("rest", rest_seconds)
            else:  # a request is being answered, or the keep-alive timer runs
                self.await_only(None)

        def await_only(self, what: str | None, seconds: float = 0.0) -> None:
            """So long for that, from the first time on; bytes that dribble in win no more."""
            if what == self.awaited:
                return
            if self.timer is not None:
                self.timer.cancel()
            self.awaited = what
            self.timer = None if what is None else self.loop.call_later(seconds, self.too_late)

        def too_late(self) -> None:
            if self.transport.is_closing():
                return
            if self.awaited == "headers" and self.conn.trailing_data[0]:
                message = f"the headers did not arrive within {header_seconds:g} seconds"
                self.end_with(ApiError(408, message, code="header_timeout"))
            self.transport.close()

        def send_400_response(self, msg: str) -> None:
            self.end_with(ApiError(400, "this is not HTTP/1.1", code="invalid_http"))
            self.transport.close()

        def end_with(self, error: ApiError) -> None:
            """The answer to what never became a request."""
            body = json.dumps(error.body).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers.append(("connection", "close"))
            events = (h11.Response(status_code=error.status_code, headers=headers), h11.Data(data=body))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    return LimitedProtocol
