"""Bodies take no more memory than they may: none where none is read, and so much of all together."""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.errors import add_error_handlers
from jaxspec.serving.http.limits import Gate, add_limits
from jaxspec.serving.http.settings import HttpSettings
from tests.serving.listening import Listening, error_in, eventually

LIMIT, TOTAL = 60_000, 100_000


class Server:
    """An app that keeps bodies until it is told to go on."""

    def __init__(self) -> None:
        self.gate, self.go_on, self.app = Gate(50), threading.Event(), FastAPI()
        add_error_handlers(self.app)
        settings = HttpSettings(max_body_bytes=LIMIT, max_total_body_bytes=TOTAL, body_timeout=1.0)
        add_limits(self.app, settings, self.gate)

        @self.app.post("/keep")
        async def keep(request: Request) -> dict[str, int]:
            length = len(await request.body())
            while not self.go_on.is_set() and not await request.is_disconnected():
                await asyncio.sleep(0.01)
            return {"length": length}

        for path in ("/health", "/ready", "/metrics", "/other"):
            self.app.api_route(path, methods=["GET", "POST"])(lambda: {"ok": True})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def port(server) -> Iterator[int]:
    with Listening(server.app, http=limited_protocol(5.0, 0.5)) as port:
        yield port


@contextlib.contextmanager
def sent(port: int, method: str, path: str, length: int | None, content: bytes) -> Iterator[socket.socket]:
    """A connection on which a request has been sent, perhaps not to its end; without a length in chunks."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + (f"{len(content):x}\r\n".encode() + content + b"\r\n" if length is None else content))
        yield connection


def answer(connection: socket.socket) -> bytes:
    """The next answer, whole."""
    received = b""
    while True:
        head, separator, content = received.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if separator and length and len(content) == int(length[1]):
            return received
        more = connection.recv(65536)
        assert more, received
        received += more


@pytest.mark.parametrize("length", [64 * 2**20, 1, None])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/health"), ("POST", "/ready"), ("POST", "/metrics"), ("GET", "/health"), ("GET", "/other")],
)
def test_where_no_body_is_taken_it_is_refused_before_it_has_come(port, method, path, length):
    with sent(port, method, path, length, b"x") as connection:
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    error = error_in(received)
    assert error["code"] == "body_not_taken" and error["message"] == f"{method} {path} takes no body"


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics", "/openapi.json", "/nowhere"])
def test_no_path_that_only_tells_takes_a_body(engine, path):
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request("GET", path, content=b"x")

    assert asyncio.run(ask()).status_code == 413


def test_a_body_of_no_bytes_is_none(port):
    with sent(port, "GET", "/health", 0, b"") as connection:
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("length", [LIMIT, None])
def test_all_bodies_together_are_limited_until_their_answers_are_given(server, port, length):
    with sent(port, "POST", "/keep", LIMIT, bytes(LIMIT)) as first:
        assert eventually(lambda: server.gate.inside == 1, 5)
        with sent(port, "POST", "/keep", length, bytes(LIMIT - 1)) as second:
            received = answer(second)
        assert received.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 2\r\n" in received
        assert error_in(received)["code"] == "too_many_bytes"
        with sent(port, "POST", "/keep", TOTAL - LIMIT, bytes(TOTAL - LIMIT)) as third:  # there is room for that
            assert eventually(lambda: server.gate.inside == 2, 5)
            server.go_on.set()
            assert b'{"length":40000}' in answer(third)
        assert b'{"length":60000}' in answer(first)
    assert eventually(lambda: server.gate.inside == 0, 5)
    with sent(port, "POST", "/keep", LIMIT, bytes(LIMIT)) as again:
        assert b'{"length":60000}' in answer(again)


def test_what_never_comes_whole_is_not_held_any_longer(server, port):
    """Whoever leaves, is too slow, or sends too much."""
    for _ in range(3):
        with sent(port, "POST", "/keep", LIMIT, bytes(50_000)):
            assert eventually(lambda: server.gate.inside == 1, 5)
        assert eventually(lambda: server.gate.inside == 0, 5)
        with sent(port, "POST", "/keep", LIMIT, bytes(50_000)) as slow:
            assert answer(slow).startswith(b"HTTP/1.1 408 ")
        with sent(port, "POST", "/keep", None, bytes(LIMIT + 1)) as large:
            assert answer(large).startswith(b"HTTP/1.1 413 ")
    server.go_on.set()
    with sent(port, "POST", "/keep", LIMIT, bytes(LIMIT)) as again:
        assert b'{"length":60000}' in answer(again)


def test_the_total_is_at_least_one_body():
    with pytest.raises(ValueError, match="max_total_body_bytes must be at least 2000, got 1000"):
        HttpSettings(max_body_bytes=2000, max_total_body_bytes=1000)
