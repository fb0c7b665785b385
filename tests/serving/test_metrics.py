"""What Prometheus reads equals what the engine did and what clients saw."""

import asyncio
import dataclasses
import time

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from jaxspec.prompting import encode_prompt
from jaxspec.serving.caches import CacheUse
from jaxspec.serving.http.choices import Choices
from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.metrics import Metrics, add_metrics
from jaxspec.serving.requests import Stream
from jaxspec.serving.stats import EngineStats
from jaxspec.speculation.params import SamplingParams

PROMPT = "What is a chart for?"


def scraped(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, labels' values ..) -> value."""
    app = FastAPI()
    add_metrics(app, metrics)

    async def scrape() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/metrics")

    response = asyncio.run(scrape())
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.documentation for family in families)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


@dataclasses.dataclass
class Told:
    """An engine that says what it is given to say: what is tested is the way from there."""

    said: EngineStats
    ready: bool = True

    def stats(self) -> EngineStats:
        return self.said


def test_every_total_of_the_engine_is_there_under_its_conventional_name():
    said = EngineStats(
        running=3,
        waiting=5,
        slots=8,
        drafts=100,
        draft_tokens=700,
        accepted_tokens=321,
        accepted_at_position=(90, 70, 41),
        rounds=110,
        prompt_tokens=4000,
        cached_prompt_tokens=1200,
        generated_tokens=431,
        finished={"stop": 7, "length": 2, "error": 1},
        images=CacheUse(hits=11, misses=4, bytes=1_000, limit=2_000),
        prefixes=CacheUse(hits=6, misses=9, bytes=3_000, limit=4_000),
        compilations=17,
        costs=((8, "6/2/8", 0.012, 3.5),),
    )
    engine = Told(said, ready=False)
    values = scraped(Metrics(engine))
    spec = "jaxspec_spec_decode"
    expected = {
        (f"{spec}_num_drafts_total",): 100,
        (f"{spec}_num_draft_tokens_total",): 700,
        (f"{spec}_num_accepted_tokens_total",): 321,
        (f"{spec}_rounds_total",): 110,
        (f"{spec}_num_accepted_tokens_per_pos_total", "0"): 90,
        (f"{spec}_num_accepted_tokens_per_pos_total", "1"): 70,
        (f"{spec}_num_accepted_tokens_per_pos_total", "2"): 41,
        ("jaxspec_num_requests_running",): 3,
        ("jaxspec_num_requests_waiting",): 5,
        ("jaxspec_num_slots",): 8,
        ("jaxspec_ready",): 0,
        ("jaxspec_prompt_tokens_total",): 4000,
        ("jaxspec_cached_prompt_tokens_total",): 1200,
        ("jaxspec_generation_tokens_total",): 431,
        ("jaxspec_compilations_total",): 17,
        ("jaxspec_requests_finished_total", "stop"): 7,
        ("jaxspec_requests_finished_total", "length"): 2,
        ("jaxspec_requests_finished_total", "error"): 1,
        ("jaxspec_requests_finished_total", "cancelled"): 0,
        ("jaxspec_round_seconds", "8", "6/2/8"): 0.012,
        ("jaxspec_round_tokens", "8", "6/2/8"): 3.5,
        ("jaxspec_cache_hits_total", "images"): 11,
        ("jaxspec_cache_hits_total", "prefixes"): 6,
        ("jaxspec_cache_misses_total", "images"): 4,
        ("jaxspec_cache_misses_total", "prefixes"): 9,
        ("jaxspec_cache_bytes", "images"): 1_000,
        ("jaxspec_cache_bytes", "prefixes"): 3_000,
        ("jaxspec_cache_limit_bytes", "images"): 2_000,
        ("jaxspec_cache_limit_bytes", "prefixes"): 4_000,
    }
    assert {key: values.get(key) for key in expected} == expected
    engine.ready = True
    assert scraped(Metrics(engine))[("jaxspec_ready",)] == 1


def test_two_apps_in_one_process_count_for_themselves(engine):
    first, second = Metrics(engine), Metrics(engine)
    first.whole.observe(1.0)
    name = ("jaxspec_e2e_request_latency_seconds_count",)
    assert scraped(first)[name] == 1 and scraped(second)[name] == 0


@pytest.fixture
def watched(engine):
    """Answers one request, and returns metrics, result, times of its pieces and what the engine says it took."""

    def answer(max_new_tokens: int):
        metrics = Metrics(engine)
        stream = engine.submit(encode_prompt(engine.target, PROMPT), SamplingParams(temperature=0), max_new_tokens)

        async def read():
            return [(time.perf_counter(), piece) async for piece in metrics.watched(stream)]

        return metrics, asyncio.run(read()), stream.served

    return answer


def test_histograms_hold_what_a_client_sees(watched, engine):
    before = engine.stats()
    metrics, pieces, served = watched(24)
    result = pieces[-1][1].result
    tokens = [len(piece.tokens) for _, piece in pieces]
    assert sum(tokens) == len(result.tokens) > 1
    values = scraped(metrics)
    for name, value in (
        ("time_to_first_token", served.first_token_seconds),
        ("request_queue_time", served.queue_seconds),
        ("e2e_request_latency", served.total_seconds),
    ):
        assert values[(f"jaxspec_{name}_seconds_count",)] == 1
        assert values[(f"jaxspec_{name}_seconds_sum",)] == pytest.approx(value)
    after_first = sum(tokens) - next(filter(None, tokens))
    assert values[("jaxspec_inter_token_latency_seconds_count",)] == after_first
    assert values[("jaxspec_inter_token_latency_seconds_sum",)] <= pieces[-1][0] - pieces[0][0] + 0.01
    assert values[("jaxspec_generation_tokens_total",)] - before.generated_tokens == len(result.tokens)


def test_requests_that_are_left_or_take_too_long_count_with_the_time_they_had(engine):
    """One in the middle of its answer, one that never gets a token."""
    metrics, prompt = Metrics(engine), encode_prompt(engine.target, PROMPT)
    silent = Stream(lambda: None)

    async def leave() -> None:
        running = engine.submit(prompt, SamplingParams(temperature=0, min_tokens=400), 400)
        for stream in (running, silent):
            choices = Choices([stream], asyncio.get_running_loop().time() + 0.5, metrics.watched)
            if stream is running:
                await choices.next()
            else:
                with pytest.raises(ApiError, match="took longer"):
                    await choices.all_results()
            choices.close()
            await asyncio.wait(choices._tasks, timeout=5)

    asyncio.run(leave())
    values = scraped(metrics)
    for name, count in (("e2e_request_latency", 2), ("time_to_first_token", 2), ("request_queue_time", 0)):
        assert values[(f"jaxspec_{name}_seconds_count",)] == count, name
    assert values[("jaxspec_time_to_first_token_seconds_sum",)] >= 0.45
    assert values[("jaxspec_e2e_request_latency_seconds_sum",)] >= 0.45


def test_one_token_has_no_time_between_tokens(watched):
    metrics, _, _ = watched(1)
    values = scraped(metrics)
    assert values[("jaxspec_inter_token_latency_seconds_count",)] == 0
    assert values[("jaxspec_time_to_first_token_seconds_count",)] == 1
