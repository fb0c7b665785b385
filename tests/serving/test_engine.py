"""Many requests at once: every answer is the one that its request gets alone, whoever comes and goes beside it."""

import asyncio
import dataclasses
import functools
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspec import SamplingParams
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.grammar import Grammars
from jaxspec.serving.requests import EngineSettings, QueueFull, Stopping
from jaxspec.serving.warming import WarmUp
from jaxspec.targets.images import ImageLayout
from tests.helpers import MIXED_SAMPLING

LIMITS = (24, 3, 40, 1, 20, 30)
LAZY = EngineSettings(max_length=256, max_num_seqs=3, warm_up=False)


class Served:
    """An engine, requests, and what each is answered alone."""

    def __init__(self, generator, requests, **options):
        self.generator = generator
        asked = [requests[index % len(requests)] for index in range(len(LIMITS))]
        self.prompts = [encode_prompt(generator.target, *request) for request in asked]
        chosen = dataclasses.replace(LAZY, **options)
        self.engine = Engine(generator.target, generator.drafter, generator.tree, chosen).start()
        self.alone = [
            generator.generate_encoded([prompt], sampling, limit)[0]
            for prompt, sampling, limit in zip(self.prompts, MIXED_SAMPLING, LIMITS, strict=True)
        ]

    def submit(self, index, **options):
        return self.engine.submit(self.prompts[index], MIXED_SAMPLING[index], LIMITS[index], **options)

    def check(self, index, result):
        expected = self.alone[index]
        assert result.tokens.tolist() == expected.tokens.tolist()
        assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
        assert result.text_ends.tolist() == expected.text_ends.tolist()
        if expected.logprobs is not None:
            for ours, theirs in zip(
                dataclasses.astuple(result.logprobs), dataclasses.astuple(expected.logprobs), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)


def wait_for(condition, seconds=60.0):
    until = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < until, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(generators, requests):
    made = functools.cache(lambda name, **options: Served(generators(name), requests, **options))
    yield made
    for name, options in (("vispec", ()), ("autoregressive", ())):
        made(name, **dict(options)).engine.stop()


@pytest.mark.parametrize("name", ["vispec", "autoregressive"])
def test_answers_are_those_of_requests_alone(served, name):
    """Requests arrive at random times, some are cancelled; trees change meanwhile."""
    service = served(name)
    event = st.tuples(st.integers(0, len(LIMITS) - 1), st.sampled_from([0.0, 0.0, 0.02]), st.integers(0, 9))

    @settings(deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))
    @given(schedule=st.lists(event, min_size=3, max_size=9))
    def any_schedule(schedule):
        streams = []
        for index, pause, cancelled in schedule:
            time.sleep(pause)
            stream = service.submit(index, client=str(index % 2))
            if cancelled == 0:
                stream.cancel()
            streams.append((index, stream, cancelled == 0))
        for index, stream, cancelled in streams:
            pieces = list(stream)
            result = pieces[-1].result
            if cancelled and result.finish_reason == "cancelled":
                assert result.tokens.tolist() == service.alone[index].tokens[: len(result.tokens)].tolist()
                continue
            service.check(index, result)
            assert "".join(piece.text for piece in pieces) == result.text
            assert np.concatenate([piece.tokens for piece in pieces]).tolist() == result.tokens.tolist()
            assert stream.served.queue_seconds <= stream.served.first_token_seconds <= stream.served.total_seconds

    any_schedule()
    stats = service.engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.generated_tokens > 0 and stats.finished["length"] > 0
    if name == "vispec":
        assert 0 < stats.accepted_tokens <= stats.draft_tokens
        assert sum(stats.accepted_at_position) == stats.accepted_tokens
        assert stats.drafts <= stats.rounds


def test_stop_strings_end_a_row_and_free_its_slot(served):
    service = served("vispec")
    whole = service.engine.submit(service.prompts[0], SamplingParams(), 40).result()
    stop = whole.text[8:12]
    stream = service.engine.submit(service.prompts[0], SamplingParams(stop=(stop,)), 40)
    result = stream.result()
    expected = service.generator.generate_encoded([service.prompts[0]], SamplingParams(stop=(stop,)), 40)[0]
    assert (result.text, result.finish_reason) == (expected.text, "stop")
    assert result.tokens.tolist() == expected.tokens.tolist()
    wait_for(lambda: service.engine.stats().running == 0)


def test_pieces_can_be_awaited(served):
    service = served("vispec")

    async def texts(index):
        return [piece.text async for piece in service.submit(index)]

    async def together():
        return await asyncio.gather(*(texts(index) for index in range(len(LIMITS))))

    for index, answer in enumerate(asyncio.run(together())):
        assert "".join(answer) == service.alone[index].text


def test_cancelling_frees_a_slot_at_the_next_round(served):
    service = served("vispec")
    streams = [service.engine.submit(service.prompts[0], SamplingParams(), 180) for _ in range(3)]
    firsts = [next(iter(stream)) for stream in streams]
    assert all(len(piece.tokens) for piece in firsts)
    waiting = service.submit(1)
    streams[1].cancel()
    result = streams[1].result()
    assert result.finish_reason == "cancelled" and len(result.tokens) < 180
    service.check(1, waiting.result())
    for stream in streams:
        stream.cancel()
    wait_for(lambda: service.engine.stats().running == 0)
    assert service.engine.stats().finished["cancelled"] >= 3


def test_a_prompt_is_read_when_everybody_before_it_leaves_at_once(served):
    service = served("vispec")
    engine = service.engine
    # Three have the slots, one waits for a slot with its first token.
    before = [engine.submit(service.prompts[0], SamplingParams(min_tokens=180), 180) for _ in range(4)]
    firsts = [next(iter(stream)) for stream in before]
    assert all(len(piece.tokens) for piece in firsts)
    waiting = service.submit(1)
    wait_for(lambda: engine.stats().waiting == 1)
    with engine._changed:  # between two rounds
        for stream in before:
            stream.cancel()
    wait_for(lambda: engine.stats().waiting == 0, 10)
    service.check(1, waiting.result())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_kept_and_changes_no_other_answer(served, temperature):
    """With drafts and without the same answer; rows beside it answer as alone."""
    answers = []
    for name in ("vispec", "autoregressive"):
        service = served(name)
        target = service.generator.target
        grammars = Grammars(target.tokenizer, target.model.vocab_size, target.stop_token_ids)
        grammar = grammars.regex(r"(left|right)( [a-c]{2,5})? [0-9]{3}\.")
        others = [service.submit(index) for index in (1, 4)]
        sampling = SamplingParams(temperature=temperature, seed=3)
        streams = [service.engine.submit(prompt, sampling, 40, grammar) for prompt in service.prompts[:2]]
        for index, stream in zip((1, 4), others, strict=True):
            service.check(index, stream.result())
        results = [stream.result() for stream in streams]
        for result in results:
            assert re.fullmatch(r"(left|right)( [a-c]{2,5})? [0-9]{3}\.", result.text)
            assert result.finish_reason == "stop"
        answers.append([result.tokens.tolist() for result in results])
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="min_tokens cannot be kept where a grammar says"):
        service.engine.submit(service.prompts[0], SamplingParams(min_tokens=2), 40, grammar)


def test_what_cannot_be_answered_is_refused_at_once(served):
    service = served("vispec")
    prompt, long = service.prompts[0], np.full(256, 5, np.int32)
    with pytest.raises(ValueError, match="with max_length 256 it may have at most 255"):
        service.engine.submit(dataclasses.replace(prompt, input_ids=long))
    with pytest.raises(ValueError, match="stop_token_ids may have 15 entries, got 16"):
        service.engine.submit(prompt, SamplingParams(stop_token_ids=tuple(range(16))))
    with pytest.raises(ValueError, match="max_new_tokens"):
        service.engine.submit(prompt, SamplingParams(), 0)
    with pytest.raises(ValueError, match="logit_bias has token 999999"):
        service.engine.submit(prompt, SamplingParams(logit_bias={999999: 1.0}))


def test_one_bad_request_harms_no_other(served):
    """An image whose pixels are no numbers, and one that the tower cannot take."""
    service = served("vispec")
    good = [service.submit(index) for index in (1, 4)]
    layout = service.prompts[1].images[0]
    pixels = [np.full_like(layout.pixels, np.nan), layout.pixels[..., :1, :1]]
    bad = [
        service.engine.submit(
            dataclasses.replace(service.prompts[1], images=[ImageLayout(each, layout.index, layout.table_size)])
        )
        for each in pixels
    ]
    good += [service.submit(index) for index in (0, 1)]
    not_a_number, misshapen = (stream.result() for stream in bad)
    assert not_a_number.finish_reason == misshapen.finish_reason == "error"
    assert "are not finite (NaN or infinity), after 0 generated tokens" in not_a_number.error
    assert misshapen.error == "reading the prompt failed" and misshapen.cause
    for index, stream in zip((1, 4, 0, 1), good, strict=True):
        service.check(index, stream.result())


def test_a_long_prompt_does_not_hold_up_others(generators, monkeypatch):
    """While it is read in chunks, rows that run go on."""
    generator = generators("autoregressive")
    target = generator.target
    long = encode_prompt(target, "What is on the left of the picture? " * 60)
    short = encode_prompt(target, "What is a chart for?")
    settings = EngineSettings(max_length=1024, max_num_seqs=2, warm_up=False, prefill_chunk=64, prefix_cache_bytes=0)
    with Engine(target, settings=settings) as engine:
        for prompt in (short, long):  # compiles
            engine.submit(prompt, SamplingParams(), 30).result()
        read_step, chunks = engine.programs.read_step, []

        def after_a_round(*chunk):
            rounds = engine.stats().rounds
            wait_for(lambda: engine.stats().rounds > rounds)
            chunks.append(rounds)
            return read_step(*chunk)

        running = engine.submit(short, SamplingParams(min_tokens=900), 900)
        next(iter(running))
        monkeypatch.setattr(engine.programs, "read_step", after_a_round)
        assert engine.submit(long, SamplingParams(), 2).result().error is None
        running.cancel()
        assert len(long.input_ids) > 8 * 64
        assert len(chunks) == 9 and len(set(chunks)) == 9


def test_an_engine_that_breaks_says_so_to_everybody(generators, monkeypatch):
    generator = generators("autoregressive")
    prompt = encode_prompt(generator.target, "What is a chart for?")
    monkeypatch.setattr(WarmUp, "first", lambda warm_up: warm_up.slots.sizes.index("no memory"))
    engine = Engine(generator.target, settings=dataclasses.replace(LAZY, warm_up=True))
    stream = engine.submit(prompt)
    engine.start()
    result = stream.result()
    assert result.error == "the engine has stopped" and result.cause.startswith("ValueError: ")
    assert engine.failure.startswith("the engine has stopped: ValueError: ")
    with pytest.raises(Stopping, match="the engine has stopped"):
        engine.submit(prompt)
    engine.stop()


def test_a_fault_of_the_rounds_ends_its_rows_and_not_the_engine(served, monkeypatch):
    service = served("vispec")
    whole, broken = type(service.engine._slots).run, threading.Event()

    def run(slots, tree, rounds):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("the device is gone")
        return whole(slots, tree, rounds)

    monkeypatch.setattr(type(service.engine._slots), "run", run)
    result = service.submit(0).result()
    assert (result.finish_reason, result.error) == ("error", "decoding failed")
    assert result.cause == "RuntimeError: the device is gone"
    service.check(0, service.submit(0).result())


def test_no_memory_for_more_slots_ends_its_rows_and_not_the_engine(served, monkeypatch):
    service = served("vispec")
    insert, broken = type(service.engine._slots).insert, threading.Event()

    def inserting(slots, *arguments):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("out of memory")
        return insert(slots, *arguments)

    monkeypatch.setattr(type(service.engine._slots), "insert", inserting)
    result = service.submit(0).result()
    assert (result.finish_reason, result.error, result.cause) == (
        *("error", "decoding failed", "RuntimeError: out of memory"),
    )
    service.check(0, service.submit(0).result())


def test_images_and_prompts_are_kept(generators, requests):
    """The same picture is encoded once, the same beginning read once, both within their bytes; answers stay."""
    service = Served(generators("vispec"), requests)
    engine, target = service.engine, service.generator.target
    questions = ["How many shapes are there?", "How many shapes are there on the left?", "How many are red?"]
    prompts = [encode_prompt(target, question, requests[1][1]) for question in questions]
    alone = [service.generator.generate_encoded([prompt], SamplingParams(), 12)[0] for prompt in prompts]
    cached = []
    for prompt, expected in zip(prompts * 2, alone * 2, strict=True):
        stream = engine.submit(prompt, SamplingParams(), 12)
        assert stream.result().tokens.tolist() == expected.tokens.tolist()
        cached.append(stream.served.cached_tokens)
    engine.stop()
    images = sum(len(layout.index) for layout in prompts[0].images)
    assert cached[0] == 0 and all(each > images for each in cached[1:])
    assert cached[3:] == [len(prompt.input_ids) - 1 for prompt in prompts]
    stats = engine.stats()
    assert (stats.images.misses, stats.prefixes.misses) == (1, 1)
    assert stats.prefixes.hits == 5 and 0 < stats.prefixes.bytes <= stats.prefixes.limit
    assert stats.cached_prompt_tokens == sum(cached)


def test_the_queue_is_bounded_and_the_end_is_orderly(generators, requests):
    service = Served(generators("vispec"), requests, max_num_seqs=1, max_queued_requests=2)
    engine = service.engine
    first = engine.submit(service.prompts[0], SamplingParams(), 200)
    next(iter(first))
    waiting = []
    with pytest.raises(QueueFull, match="requests wait already"):  # noqa: PT012
        for _ in range(5):
            waiting.append(service.submit(2))
    assert 2 <= len(waiting) <= 4
    ended = threading.Thread(target=engine.stop, args=(60.0,))
    ended.start()
    wait_for(lambda: engine._stopping)
    with pytest.raises(Stopping):
        service.submit(1)
    for stream in waiting:
        service.check(2, stream.result())
    assert first.result().finish_reason in ("length", "stop")
    ended.join()


def test_what_is_left_when_time_is_over_is_cancelled(generators, requests):
    service = Served(generators("autoregressive"), requests, max_num_seqs=1)
    streams = [service.engine.submit(service.prompts[0], SamplingParams(), 200) for _ in range(3)]
    next(iter(streams[0]))
    service.engine.stop()
    for stream in streams:
        result = stream.result()
        assert result.finish_reason == "cancelled"
        assert result.error == "the engine was stopped before the answer was complete"
