"""Clients that do not read what they asked for: their connection, its bytes and their place are given back."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.errors import add_error_handlers
from jaxspec.serving.http.limits import Gate, add_limits
from jaxspec.serving.http.settings import HttpSettings
from tests.serving.listening import Listening, eventually

SECONDS = 1.0
LARGE = 180 * 65536
GATE = Gate(50)


@pytest.fixture(scope="module")
def server() -> Iterator[Listening]:
    app = FastAPI()
    add_error_handlers(app)
    add_limits(app, HttpSettings(), GATE)

    @app.get("/large")
    def large() -> Response:
        return Response(bytes(LARGE))

    @app.get("/parts")
    def parts() -> StreamingResponse:
        return StreamingResponse(bytes(65536) for _ in range(LARGE // 65536))

    @app.get("/quiet")
    async def quiet() -> StreamingResponse:
        async def some() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"data: {}\n\n"
                await asyncio.sleep(SECONDS)

        return StreamingResponse(some())

    @app.get("/unfinished")
    async def unfinished() -> StreamingResponse:
        async def some() -> AsyncIterator[bytes]:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    while True:
                        yield bytes(65536)
            raise RuntimeError("its time is over")

        return StreamingResponse(some())

    listening = Listening(app, http=limited_protocol(5.0, unread_seconds=SECONDS), timeout_keep_alive=1)
    with listening:
        yield listening


@pytest.fixture
def port(server) -> int:
    assert eventually(lambda: not server.server.server_state.connections, 5)
    return server.server.servers[0].sockets[0].getsockname()[1]


def asking(port: int, path: str) -> socket.socket:
    """A connection that takes little at a time."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    return connection


@pytest.mark.parametrize("path", ["/large", "/parts", "/unfinished"])
def test_whoever_reads_nothing_is_cut_off(server, port, path):
    with asking(port, path) as connection:
        assert eventually(lambda: len(server.server.server_state.connections) == 1, 5)
        started = time.monotonic()
        assert eventually(lambda: not server.server.server_state.connections, 10)
        assert 0.5 * SECONDS < time.monotonic() - started < 8 * SECONDS
        assert eventually(lambda: GATE.inside == 0, 5)
        with pytest.raises(OSError):  # a reset: what had not been read is gone
            while connection.recv(2**20):
                pass
            raise ConnectionError("closed before all was read")


def test_an_answer_in_parts_keeps_its_place_until_it_is_read(server, port):
    """So that there are no more large answers in memory than there may be requests."""
    with asking(port, "/parts"):
        assert eventually(lambda: GATE.inside == 1, 5)
        time.sleep(0.5 * SECONDS)
        assert GATE.inside == 1
    assert eventually(lambda: GATE.inside == 0, 10)


@pytest.mark.parametrize("path", ["/large", "/parts"])
def test_whoever_reads_slowly_gets_everything(port, path):
    """In longer than somebody has who does not read at all."""
    received, started = 0, time.monotonic()
    with asking(port, path) as connection:
        while content := connection.recv(2**18):  # until the idle connection is closed
            received += len(content)
            if received < LARGE // 2:
                time.sleep(0.005)
    assert received > LARGE and time.monotonic() - started > 1.5 * SECONDS


def test_an_answer_that_waits_for_its_next_part_is_no_unread_one(port):
    received = b""
    with asking(port, "/quiet") as connection:
        while b"0\r\n\r\n" not in received:
            received += connection.recv(65536)
    assert received.count(b"data: {}") == 5
