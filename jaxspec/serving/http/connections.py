"""uvicorn's protocol for connections that may be hostile: so long for headers, for the rest of a refused body, and for
reading what was answered."""

import asyncio
import json
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspec.serving.http.errors import ApiError

log = logging.getLogger(__name__)
LEAST_READ = 64 * 2**10
"""Bytes that a client must take of an answer in `unread_seconds`, or all that is left."""
LOOKS = 8
"""How often it is looked at in that time. They are counted, not the seconds: where this process itself has stood still,
that is one look."""


def limited_protocol(
    header_seconds: float, rest_seconds: float = 10.0, unread_seconds: float = 60.0
) -> type[H11Protocol]:
    """A protocol with clocks. A request's headers must be there `header_seconds` after its first byte (after the
    connection, for the first request), else 408 and the end. Whoever was answered before its body had arrived (413,
    401) has `rest_seconds` to send the rest, which is thrown away: closing at once would take the answer away from a
    client that reads only after it has written. Of an answer that waits to be read `LEAST_READ` bytes must go in every
    `unread_seconds`, else the connection is aborted: closing it would wait for the client to read."""

    class LimitedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        awaited: str | None = None
        looking: asyncio.TimerHandle | None = None
        unread: int | None = None  # bytes that were left when the client was last seen to read
        looks = 0  # since then

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore[bad-override]
            super().connection_made(transport)
            self.watch()
            self.looking = self.loop.call_later(unread_seconds / LOOKS, self.look)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.unread = None
            self.watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.unread = None

        def connection_lost(self, exc: Exception | None) -> None:
            self.await_only(None)
            if self.looking is not None:
                self.looking.cancel()
            super().connection_lost(exc)

        def look(self) -> None:
            """Now and then: whether the client reads. Only where nothing is added meanwhile can that be told."""
            left = self.transport.get_write_buffer_size()
            nothing_added = self.flow.write_paused or self.cycle is None or self.cycle.response_complete
            if not left or not (nothing_added or self.transport.is_closing()):
                self.unread = None
            elif self.unread is None or left <= self.unread - LEAST_READ:
                self.unread, self.looks = left, 0
            else:
                self.looks += 1
                if self.looks == LOOKS:
                    log.warning("a client did not read its answer; its connection is cut off")
                    self.transport.abort()
                    return
            self.looking = self.loop.call_later(unread_seconds / LOOKS, self.look)

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
