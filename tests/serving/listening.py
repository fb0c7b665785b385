"""uvicorn in a thread of the test, on a free port of the loopback interface."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn


class Listening(threading.Thread):
    """A context: the app's port."""

    def __init__(self, app: Any, **config: Any) -> None:
        super().__init__(daemon=True)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", **config))

    def run(self) -> None:
        self.server.run()

    def __enter__(self) -> int:
        self.start()
        assert eventually(lambda: self.server.started, 20)
        return self.server.servers[0].sockets[0].getsockname()[1]

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.join(20)


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true within so long."""
    until = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < until:
        time.sleep(0.01)
    return true


def talk(port: int, sends: list[bytes], seconds: float) -> tuple[bytes, float]:
    """What comes back on one connection until it is closed, and when that is; a part is sent every `seconds`."""
    started, received = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(seconds)
        for part in [*sends, *(200 * [b""])]:
            try:
                connection.sendall(part)
                data = connection.recv(65536)
            except TimeoutError:
                if time.monotonic() - started > 8:
                    break
                continue
            except OSError:
                break
            received += data
            if not data:
                break
    return received, time.monotonic() - started


def error_in(received: bytes) -> dict:
    """The error in the first answer."""
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]
