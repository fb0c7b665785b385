"""The front: takes requests from Ray's HTTP proxy, finds each conversation's replica, and hands its answer on.

Ray's own proxy knows neither who belongs to which conversation, which stands in the body, nor how OpenAI's clients want
to hear that a replica has died. Which replica a conversation has is consistent hashing of Ray's: the same one while it
lives and has room, else the next.
"""

import asyncio
import contextlib
import logging
import time

from fastapi import FastAPI, Response
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

import jaxspec
from jaxspec.serving.http.answers import event
from jaxspec.serving.http.errors import ApiError, add_error_handlers, in_the_log, timed_out
from jaxspec.serving.http.limits import Gate, add_limits, deadline_of
from jaxspec.serving.http.schema import Health, Ready
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.replicas.replica import STALE_SECONDS, Report
from jaxspec.serving.replicas.sessions import session_of

LARGE_BODY = 2**20
"""Bytes from which on a body is read in a thread, so that it holds up no stream."""
PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
"""Of a request's scope, beside its headers and the client's address."""

log = logging.getLogger(__name__)


class Front:
    """An ingress of Ray Serve.

    Args:
      replicas: the deployment of `Replica`.
      settings: of the HTTP app; key and body are looked at here already.
      limit: most requests that are here at a time, waiting ones included.
    """

    def __init__(self, replicas: DeploymentHandle, settings: HttpSettings, limit: int) -> None:
        self.replicas, self.settings, self.gate = replicas, settings, Gate(limit)
        self.reports: dict[str, tuple[float, Report]] = {}  # when each replica told what
        self.ending = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = FastAPI(title="jaxspec", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        add_error_handlers(app)
        add_limits(app, self.settings, self.gate)
        app.get("/health")(self.health)
        app.get("/ready")(self.ready)
        app.get("/metrics", response_class=Response)(self.metrics)
        app.mount("/", self.forward)
        return app

    def close(self) -> int:
        """Let no more requests in. How many are still inside."""
        self.gate.closed = True
        return self.gate.inside

    def stop(self) -> None:
        """End what is still inside."""
        self.ending = True

    async def report(self, report: Report) -> bool:
        """Hears how a replica does. Whether it shall end all answers."""
        now = time.monotonic()
        self.reports[report.replica] = now, report
        self.reports = {name: each for name, each in self.reports.items() if now - each[0] < STALE_SECONDS}
        return self.ending

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of a replica, as it comes; an error in OpenAI's shape where there is none."""
        body = (await receive())["body"]  # all of it: `LimitBody` has read it
        headers = Headers(scope=scope)
        if len(body) < LARGE_BODY:
            session = session_of(headers, body)
        else:
            session = await asyncio.to_thread(session_of, headers, body)
        asked = {name: scope[name] for name in PASSED_ON if name in scope}
        asked |= {"headers": list(scope["headers"]), "client": scope.get("client"), "server": scope.get("server")}
        handle = self.replicas.options(stream=True, method_name="answer", session_id=session)
        begun, ended, deadline = None, False, deadline_of(scope, self.settings.request_timeout)
        answer = handle.remote(asked, body)
        try:
            while True:
                try:
                    # The replica looks at the clock, too, but not before it has the request.
                    async with asyncio.timeout_at(None if begun is not None else deadline):
                        batch = await anext(answer)
                except StopAsyncIteration:
                    ended = True
                    return
                for message in batch:
                    if message["type"] == "http.response.start":
                        begun = Headers(raw=message["headers"])
                    await send(message)
        except Exception as error:  # noqa: BLE001 (whatever it is, the client is told)
            await self.tell(error, begun, scope, receive, send)
        finally:
            if not ended:  # the client has left, or it took too long; of a call that failed this raises again
                with contextlib.suppress(Exception):
                    answer.cancel()

    async def tell(self, error: Exception, begun: Headers | None, scope: Scope, receive: Receive, send: Send) -> None:
        """What went wrong: as an answer, or as the last event of a stream that has begun."""
        name = scope["state"]["request_id"]
        told = as_api_error(error, name)
        if told.status_code == 500:
            log.error("a replica failed to answer request %s", name, exc_info=error)
        if begun is None:
            await told.response()(scope, receive, send)
        elif begun.get("content-type", "").startswith("text/event-stream"):
            await send({"type": "http.response.body", "body": event(told.body), "more_body": False})
        else:
            raise error

    def states(self) -> list[Report]:
        """How those replicas do that said so lately."""
        now = time.monotonic()
        return [report for told, report in self.reports.values() if now - told < STALE_SECONDS]

    async def health(self) -> Health:
        """All replicas together; that there is one is another question, which /ready answers."""
        states = self.states()
        return Health(
            status="ok",
            version=jaxspec.__version__,
            model=self.settings.served_model_name,
            running=sum(state.running for state in states),
            waiting=sum(state.waiting for state in states),
            slots=sum(state.slots for state in states),
        )

    async def ready(self) -> Ready:
        """Whether a request would find a replica."""
        if self.gate.closed:
            raise ApiError(503, "the server is stopping", code="stopping")
        if not self.states():
            raise ApiError(503, "no replica is ready", code="not_ready")
        return Ready(status="ready")

    async def metrics(self) -> Response:
        """Those of all replicas, each with the name of its own as a label."""
        merged = Merged({report.replica: report.metrics for report in self.states()})
        return Response(generate_latest(merged), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class Merged:
    """A registry, as `generate_latest` reads one, of metrics in text form by the name of their replica."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def collect(self) -> list[Metric]:
        """All families once, the samples of all replicas in each."""
        families: dict[str, Metric] = {}
        for name, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels={**sample.labels, "replica": name}))
        return list(families.values())


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told of what Ray raises."""
    match error:
        case RayActorError():
            message = "the replica that worked on this request was lost, and its answer with it; ask again"
            return ApiError(503, message, code="replica_lost")
        case BackPressureError():
            return ApiError(429, "too many requests wait already; try again later", code="queue_full")
        case DeploymentUnavailableError() | ReplicaUnavailableError():
            return ApiError(503, "no replica is ready", code="not_ready")
        case TimeoutError():
            return timed_out()
    return ApiError(500, f"the server failed to answer; {in_the_log(request_id)}", code="internal_error")
