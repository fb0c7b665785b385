"""A replica: one engine and its HTTP app in a process of Ray's, where requests come through Ray instead of a socket."""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from prometheus_client.exposition import generate_latest
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import Message

from jaxspec.serving.engine import Engine
from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.settings import HttpSettings

REPLICA_HEADER = "x-jaxspec-replica"
"""Says in every answer which replica it comes from."""

REPORT_SECONDS = 0.5
STALE_SECONDS = 10.0
"""After so long without a report a replica is taken for gone."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """How a replica does, as it tells all fronts again and again."""

    replica: str
    running: int  # requests that are being answered
    waiting: int
    slots: int
    metrics: str  # all of them, in Prometheus' text format


class Replica:
    """Answers with an engine of its own. It is there once everything that usual requests need is compiled.

    Args:
      load: makes the engine, which is not started yet, in the replica's process.
      settings: of the HTTP app; the front's are the same.
    """

    def __init__(self, load: Callable[[], Engine], settings: HttpSettings) -> None:
        context = serve.get_replica_context()
        self.name, self.application, self.stopping = context.replica_id.unique_id, context.app_name, False
        self.engine = load().start()
        while not self.engine.ready:
            self.check_health()
            time.sleep(0.05)
        self.app = make_app(self.engine, settings)
        threading.Thread(target=self.report, name="jaxspec-report", daemon=True).start()

    def __del__(self) -> None:
        """Ray calls it when everybody has been answered, or the time for that is over."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.stop()

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self.engine.failure is not None:
            raise RuntimeError(self.engine.failure)

    def report(self) -> None:
        """Tells the fronts how it does, and hears whether it shall end all answers.

        Asking it instead would wait behind its requests: Ray gives it no more calls of any kind than it may have.
        """
        while not self.stopping:
            try:
                fronts = serve.get_app_handle(self.application)
                told = fronts.broadcast("report", self.state()).results(timeout_s=STALE_SECONDS)
                self.stopping = any(told)
            except Exception as error:  # noqa: BLE001 (there is no front yet, or none any more: it goes on without)
                log.info("nobody hears how this replica does: %s", error)
            time.sleep(REPORT_SECONDS)
        self.engine.stop()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The app's answer to a request, in ASGI's messages as they come. Ends the work where nobody reads on."""
        left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def receive() -> Message:
            if left:
                return left.pop()
            return await asyncio.Future()  # for ever: where the client has left, this task is cancelled

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA_HEADER] = self.name
            messages.put_nowait(message)

        async def work() -> None:
            try:
                await self.app(scope, receive, send)
            finally:
                messages.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            ended = False
            while not ended:
                news = [await messages.get()]
                while not messages.empty():
                    news.append(messages.get_nowait())
                ended = news[-1] is None
                if batch := [message for message in news if message is not None]:
                    yield batch
        finally:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                try:
                    await working
                except Exception:  # noqa: BLE001 (the app has answered with 500 all the same)
                    log.exception("a request failed")

    def state(self) -> Report:
        """How it does at the moment."""
        stats, metrics = self.engine.stats(), generate_latest(self.app.state.metrics.registry).decode()
        return Report(self.name, stats.running, stats.waiting, stats.slots, metrics)
