"""The choices of one request while they come: one stream of pieces out of n, ended in time, cancelled together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

from jaxspec.generator import Piece, Result
from jaxspec.serving.http.errors import ApiError, in_the_log, timed_out
from jaxspec.serving.requests import Stream

log = logging.getLogger(__name__)

Watch = Callable[[Stream], AsyncIterator[Piece]]
"""What pieces pass through on their way, such as a clock."""
Value = TypeVar("Value")


class Choices:
    """The pieces of several streams, in the order in which they come.

    `close` must be called whatever happens: it gives the engine's slots back.

    Args:
      streams: of the choices, in order.
      deadline: the event loop's time at which patience ends; None for never.
      watch: what each stream is read through.
      request_id: what the log calls the request.
    """

    def __init__(self, streams: Sequence[Stream], deadline: float | None, watch: Watch, request_id: str = "") -> None:
        self.streams, self.deadline, self.request_id = streams, deadline, request_id
        self.results: list[Result | None] = [None] * len(streams)
        self._news: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._forward(index, watch(stream))) for index, stream in enumerate(streams)]

    @property
    def finished(self) -> bool:
        """Whether every choice has its result."""
        return None not in self.results

    async def next(self) -> tuple[int, Piece]:
        """The next piece, and whose it is. Raises ApiError for a choice that failed, and where it takes too long."""
        try:
            async with asyncio.timeout_at(self.deadline):
                index, piece = await self._news.get()
        except TimeoutError:
            raise timed_out() from None
        if isinstance(piece, Exception):
            raise piece
        if piece.result is not None:
            check_result(piece.result, self.request_id)
            self.results[index] = piece.result
        return index, piece

    async def all_results(self) -> list[Result]:
        """The results of all choices."""
        while not self.finished:
            await self.next()
        return self.known_results()

    def known_results(self) -> list[Result]:
        """The results that are there."""
        return [result for result in self.results if result is not None]

    def close(self) -> None:
        """Cancels what still runs."""
        for stream, result in zip(self.streams, self.results, strict=True):
            if result is None:
                stream.cancel()
        for task in self._tasks:
            task.cancel()

    async def _forward(self, index: int, pieces: AsyncIterator[Piece]) -> None:
        try:
            async for piece in pieces:
                self._news.put_nowait((index, piece))
        except Exception as error:  # whoever waits for the next piece shall hear of it
            self._news.put_nowait((index, error))


def check_result(result: Result, request_id: str) -> None:
    """Raises ApiError for an answer that did not come to its own end. What was raised goes to the log and not to the
    client."""
    match result.finish_reason:
        case "stop" | "length":
            return
        case "cancelled":
            raise ApiError(503, "the server is stopping and has ended this answer", code="stopping")
    log.error("request %s could not be answered: %s (%s)", request_id, result.error, result.cause)
    message = result.error or "the answer could not be computed"
    if result.cause is not None:
        message = f"the server could not compute the answer ({message}); {in_the_log(request_id)}"
    raise ApiError(500, message, code="generation_failed")


class Gone(Exception):
    """The client has closed its connection."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """What the work gives. Ends it, and raises `Gone`, as soon as the client is not there any more."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def disconnected(request: Request) -> None:
    """Waits until the client leaves. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
