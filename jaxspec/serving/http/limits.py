"""What stands between a connection and the app: under which name, with which key, how many, how much, how long.

Plain ASGI, in this order from the outside: `Door`, `RequireKey`, `Admit`, `LimitBody`. Before them `limited_protocol`
(jaxspec/serving/http/connections.py) gives a connection so long to say what it wants, and to read what it gets.
"""

import asyncio
import base64
import binascii
import hmac
import re
import secrets
from collections.abc import MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxspec.serving.http.errors import REQUEST_ID, ApiError
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import EngineSettings

WITHOUT_KEY = ("/health",)
"""Paths that anybody may ask: whether the process lives, and nothing else."""
ALWAYS_ANSWERED = ("/health", "/ready", "/metrics")
"""Paths that cost next to nothing: they are answered while the server stops, not counted, and take no body."""
WITH_BODY = ("POST", "PUT", "PATCH")
"""Methods whose requests may have one."""
ANY_HOST = "*"
SPARE = 64


def add_limits(app: FastAPI, settings: HttpSettings, gate: "Gate") -> None:
    """Puts the limits around an app."""
    app.add_middleware(LimitBody, settings.max_body_bytes, settings.max_total_body_bytes, settings.body_timeout)
    app.add_middleware(Admit, gate)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, settings.api_key)
    app.add_middleware(Door, settings.allowed_hosts)


class Door:
    """What comes first. Websockets are closed: nothing here speaks them. A request under a name that is not the
    server's is refused: a web page may have let its own name point to this machine (DNS rebinding), and would be
    allowed to read the answers. The others get a time of arrival and an id, in the scope's state.

    Args:
      app: what is behind it.
      hosts: names that requests may have in their Host header; none, or "*" among them, for any.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = ()) -> None:
        self.app, self.hosts = app, frozenset() if ANY_HOST in hosts else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {}).update(arrived=asyncio.get_running_loop().time(), request_id=name)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REQUEST_ID, name)
            await send(message)

        if self.hosts and host_of(scope) not in self.hosts:
            message = "this server does not answer under the name in the Host header (--allowed-hosts)"
            await ApiError(403, message, code="host_not_allowed").response()(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)


def host_of(scope: Scope) -> str:
    """The name in the Host header, without its port; empty where it is none."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d*)?", Headers(scope=scope).get("host", "").lower())
    return found[1].removesuffix(".") if found else ""


def deadline_of(scope: Scope, seconds: float | None) -> float | None:
    """The event loop's time at which a request that has come through `Door` has been here for so long; None for
    never."""
    return None if seconds is None else scope["state"]["arrived"] + seconds


class RequireKey:
    """Lets a request pass that carries the key: as `Authorization: Bearer KEY`, or as the password of Basic
    authentication, which is what a browser can do with the web page."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in WITHOUT_KEY or hmac.compare_digest(given_key(scope), self.key):
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
      limit: most requests inside, those whose bodies still arrive included. /health, /ready and /metrics are not
        counted; they take no body. What the bodies may take together is `LimitBody`'s business.
      inside: requests that were let in and are not answered to their end.
      closed: the server is stopping. Whoever is inside stays.
      heartbeat: the beginning of the paths that the web page's tabs keep open as long as they are, where there is a
        page. Nobody waits for the end of these requests; there may be as many of them as of the others.
      beating: how many there are.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.inside, self.closed = limit, 0, False
        self.heartbeat: str | None = None
        self.beating = 0

    def beats(self, scope: Scope) -> bool:
        """Whether a request is a tab's that stays open."""
        return self.heartbeat is not None and scope["method"] == "GET" and scope["path"].startswith(self.heartbeat)

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
        beats = self.gate.beats(scope)
        if self.gate.closed and not beats:
            await stopping().response()(scope, receive, send)
            return
        here = self.gate.beating if beats else self.gate.inside
        if here >= self.gate.limit:
            message = f"{here} requests are here already; try again later"
            await ApiError(429, message, code="queue_full").response()(scope, receive, send)
            return
        if beats:
            await self.beat(scope, receive, send)
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

    async def beat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that lasts as long as a tab of the web page."""
        self.gate.beating += 1
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.gate.closed:
                raise
        finally:
            self.gate.beating -= 1


def stopping(message: str = "the server is stopping and takes no more requests") -> ApiError:
    """The refusal of a server that has been told to end."""
    return ApiError(503, message, code="stopping")


class LimitBody:
    """Reads a request's body before the app sees it: so many bytes (else 413) in so many seconds (else 408), and no
    more of all requests together than fit (else 503), from when they come until the answer has been given. A method or
    a path that takes no body is refused one before it is read (413).

    Args:
      app: what is behind it.
      max_bytes: of one body.
      max_total_bytes: of all that are here.
      seconds: for a body to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_total_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.max_total_bytes, self.seconds = app, max_bytes, max_total_bytes, seconds
        self.held = 0

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
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
        except ConnectionError:
            return
        else:
            size = len(body)
            try:
                await self.app(scope, replayed(body, receive), send)
            finally:
                self.held -= size

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body, which counts among those that are held. Raises ApiError, TimeoutError and ConnectionError, and then
        holds nothing."""
        too_large = ApiError(413, f"the body has more than {self.max_bytes} bytes", code="body_too_large")
        headers = Headers(scope=scope)
        said = headers.get("content-length", "")
        if scope["path"] in ALWAYS_ANSWERED or scope["method"] not in WITH_BODY:
            if said.strip("0") or "transfer-encoding" in headers:
                sentence = f"{scope['method'][:20]} {scope['path'][:100]} takes no body"
                raise ApiError(413, sentence, code="body_not_taken")
            return b""
        if said.isdecimal() and int(said) > self.max_bytes:
            raise too_large
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                part = message.get("body", b"")
                if self.held + len(part) > self.max_total_bytes:
                    sentence = "the requests that are here already are too large together; try again later"
                    raise ApiError(503, sentence, code="too_many_bytes")
                self.held += len(part)
                body += part
                if len(body) > self.max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
        except BaseException:
            self.held -= len(body)
            raise


def replayed(body: bytes, receive: Receive) -> Receive:
    """What the app reads instead: the whole body at once, then whatever else comes (that the client has gone)."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return again
