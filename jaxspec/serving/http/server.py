"""uvicorn with an end that loses nothing: a signal closes the gate, whoever is inside is answered, then it ends.

After the first SIGTERM or SIGINT /ready says 503 and so do new requests; accepted ones have `shutdown_timeout` seconds,
those that are left then are cancelled and told so. A second signal ends the process at once.
"""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from jaxspec.checks import whole_number
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.limits import Gate
from jaxspec.serving.http.settings import HttpSettings

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""What this machine calls itself."""
LAST_WORDS_SECONDS = 5.0
"""For those that are cancelled to be told so."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before a model is loaded; it does not listen yet. Port 0 is
    any free one. Raises ValueError for what is no port, OSError for an address that cannot be had."""
    whole_number("port", port, 0, 65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None
    return bound


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """Serves an app of `make_app` until a signal ends it, or what breaks the engine.

    Args:
      app, engine: the engine is started already; it may still compile.
      shutdown_timeout: seconds that accepted requests have after the signal.
      when_ready: called once, when everything is compiled.
      when_stopping: called once, with how many requests are still answered.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: HttpSettings,
        shutdown_timeout: float,
        when_ready: Callable[[], None] = lambda: None,
        when_stopping: Callable[[int], None] = lambda inside: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(settings.header_timeout, unread_seconds=settings.unread_timeout),
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=max(1, round(settings.keep_alive_timeout)),
                timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
            )
        )
        self.engine, self.shutdown_timeout = engine, shutdown_timeout
        self.gate: Gate = app.state.gate
        self.when_ready, self.when_stopping = when_ready, when_stopping
        self.announced = self.stopping = self.cancelling = False
        self.signalled: float | None = None

    def serve_on(self, bound: socket.socket) -> None:
        """Serve on a bound socket; returns after the signal, when everybody has been answered."""
        self.run(sockets=[bound])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second is it."""
        del frame
        if self.signalled is not None:
            os._exit(128 + sig)
        self.gate.closed = True
        self.signalled = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        if await super().on_tick(counter):
            return True
        if self.engine.failure is not None:
            return True
        if self.engine.ready and not self.announced:
            self.announced = True
            self.when_ready()
        if self.signalled is None:
            return False
        if not self.stopping:
            self.stopping = True
            self.when_stopping(self.gate.inside)
        if self.gate.inside == 0:
            self.config.timeout_graceful_shutdown = 1  # what is still open is a tab of the web page
            return True
        over = time.monotonic() - self.signalled - self.shutdown_timeout
        if over >= 0 and not self.cancelling:
            self.cancelling = True
            threading.Thread(target=self.engine.stop, args=(0.0,), daemon=True).start()
        return over >= LAST_WORDS_SECONDS
