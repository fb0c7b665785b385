"""What Prometheus is told, under GET /metrics: the engine's totals, read when it asks, and how long requests took.

Every app has a registry of its own. Names are jaxspec's own where vLLM's would be, with the same meaning, so that
dashboards need another prefix and nothing else.
"""

import time
from collections.abc import AsyncIterator, Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from jaxspec.generator import Piece
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.errors import ErrorAnswer
from jaxspec.serving.requests import Stream
from jaxspec.serving.stats import EngineStats

SECONDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
"""Bounds for whatever a whole request waits for."""
SECONDS_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class EngineCollector(Collector):
    """An engine's stats as Prometheus has them, taken anew at every scrape."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats = self.engine.stats()
        yield from speculation(stats)
        for name, value, about in (
            ("jaxspec_num_requests_running", stats.running, "Requests that are being answered."),
            ("jaxspec_num_requests_waiting", stats.waiting, "Requests in the queue."),
            ("jaxspec_num_slots", stats.slots, "Requests that can be answered at once."),
            ("jaxspec_ready", int(self.engine.ready), "1 when everything is compiled."),
        ):
            yield GaugeMetricFamily(name, about, value)
        for name, value, about in (
            ("jaxspec_prompt_tokens", stats.prompt_tokens, "Tokens of prompts, the cached ones included."),
            ("jaxspec_cached_prompt_tokens", stats.cached_prompt_tokens, "Those taken from prompts read before."),
            ("jaxspec_generation_tokens", stats.generated_tokens, "Tokens of answers."),
            ("jaxspec_compilations", stats.compilations, "Programs compiled since the start."),
        ):
            yield CounterMetricFamily(name, about, value)
        finished = CounterMetricFamily("jaxspec_requests_finished", "Requests that ended.", labels=["finished_reason"])
        for reason in sorted({"stop", "length", "error", "cancelled"} | set(stats.finished)):
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
        yield from caches(stats)
        yield from costs(stats)


def speculation(stats: EngineStats) -> Iterator[Metric]:
    """What drafting did."""
    for name, value, about in (
        ("rounds", stats.rounds, "Verification steps of the target, each row for itself, with a draft or without."),
        ("num_drafts", stats.drafts, "Those of them with a draft."),
        (
            "num_draft_tokens",
            stats.draft_tokens,
            "Draft tokens that could have been accepted: the depth of each draft.",
        ),
        ("num_accepted_tokens", stats.accepted_tokens, "Draft tokens that were."),
    ):
        yield CounterMetricFamily(f"jaxspec_spec_decode_{name}", about, value)
    per_position = CounterMetricFamily(
        "jaxspec_spec_decode_num_accepted_tokens_per_pos",
        "Drafts whose token at that position of the path (0 is the first) was accepted, and so all before it.",
        labels=["position"],
    )
    for position, value in enumerate(stats.accepted_at_position):
        per_position.add_metric([str(position)], value)
    yield per_position


def caches(stats: EngineStats) -> Iterator[Metric]:
    """What was found again."""
    kinds = (("images", stats.images), ("prefixes", stats.prefixes))
    for family, name, field, about in (
        (CounterMetricFamily, "hits", "hits", "Look-ups that found something."),
        (CounterMetricFamily, "misses", "misses", "Look-ups that found nothing."),
        (GaugeMetricFamily, "bytes", "bytes", "Bytes that are kept."),
        (GaugeMetricFamily, "limit_bytes", "limit", "Most bytes that may be kept."),
    ):
        metric = family(f"jaxspec_cache_{name}", about, labels=["cache"])
        for kind, use in kinds:
            metric.add_metric([kind], getattr(use, field))
        yield metric


def costs(stats: EngineStats) -> Iterator[Metric]:
    """What the engine has measured, and chooses its tree by."""
    seconds = GaugeMetricFamily("jaxspec_round_seconds", "Of one round, by slots and tree.", labels=["slots", "tree"])
    tokens = GaugeMetricFamily(
        "jaxspec_round_tokens", "That a row gets from one round, by slots and tree.", labels=["slots", "tree"]
    )
    for slots, tree, each_seconds, each_tokens in stats.costs:
        seconds.add_metric([str(slots), tree], each_seconds)
        tokens.add_metric([str(slots), tree], each_tokens)
    yield seconds
    yield tokens


class Metrics:
    """The registry of an app, and the histograms that it fills as answers pass."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))

        def histogram(name: str, about: str, bounds: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"jaxspec_{name}_seconds", about, buckets=bounds, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token", "From submission to the first token, or until a request was left without one."
        )
        self.queue = histogram("request_queue_time", "From submission until the prompt began to be read.")
        self.whole = histogram(
            "e2e_request_latency", "From submission to the last token, or until a request was left or took too long."
        )
        self.inter_token = histogram(
            "inter_token_latency",
            "Time since the tokens before, shared among the tokens that came together; each token counts once.",
            SECONDS_PER_TOKEN,
        )

    async def watched(self, stream: Stream) -> AsyncIterator[Piece]:
        """The pieces of an answer, timed as they pass. One that nobody waits for any more, because its client has left
        or its time is over, counts with the time that it had: else a server that is too slow would look fast."""
        started = time.perf_counter()
        before: float | None = None
        first: float | None = None
        ended = False
        try:
            async for piece in stream:
                now = time.perf_counter()
                count = len(piece.tokens)
                if count and before is not None:
                    for _ in range(count):
                        self.inter_token.observe((now - before) / count)
                if count:
                    before = now
                    first = now - started if first is None else first
                if piece.result is not None and stream.served is not None:
                    served, ended = stream.served, True
                    self.whole.observe(served.total_seconds)
                    if first is not None:
                        self.queue.observe(served.queue_seconds)
                        self.first_token.observe(served.first_token_seconds)
                yield piece
        finally:
            if not ended:
                waited = time.perf_counter() - started
                self.whole.observe(waited)
                self.first_token.observe(waited if first is None else first)


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    """GET /metrics, in Prometheus' text format."""

    refusals = {
        401: "The key is wrong or missing.",
        403: "The server does not answer under the name in the Host header.",
        413: "There is a body, where none is taken.",
        500: "The engine could not be asked.",
    }
    text = {"description": "All metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get(
        "/metrics",
        response_class=Response,
        summary="Prometheus metrics",
        responses={status: {"model": ErrorAnswer, "description": said} for status, said in refusals.items()}
        | {200: text},
    )
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
