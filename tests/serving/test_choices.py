"""The pieces of several choices as one, and what happens where nobody reads them."""

import asyncio
import threading

import numpy as np
import pytest

from jaxspec.generator import Piece, Result
from jaxspec.metrics import GenerationStats
from jaxspec.serving.http import chat
from jaxspec.serving.http.choices import Choices
from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.requests import Stream

NONE = np.zeros(0, np.int32)


def piece(text: str, reason: str | None = None, error: str | None = None, cause: str | None = None) -> Piece:
    result = None
    if reason is not None:
        stats = GenerationStats.of([0], prompt_tokens=1, generated_tokens=0)
        result = Result(NONE, NONE.astype(bool), text, reason, stats, NONE, error, cause=cause)
    return Piece(text, NONE, NONE.astype(bool), NONE, result)


def streams(count: int) -> tuple[list[Stream], list[threading.Event]]:
    cancelled = [threading.Event() for _ in range(count)]
    return [Stream(each.set) for each in cancelled], cancelled


def test_pieces_come_in_the_order_in_which_they_are_put():
    async def read() -> list[tuple[int, str]]:
        made, cancelled = streams(2)
        choices = Choices(made, None, Stream.__aiter__)
        put = [(1, piece("a")), (0, piece("b")), (1, piece("c", "stop")), (0, piece("d", "length"))]
        found = []
        for index, each in put:
            threading.Thread(target=made[index].put, args=(each,)).start()
            who, came = await choices.next()
            found.append((who, came.text))
        assert choices.finished and [result.text for result in choices.known_results()] == ["d", "c"]
        choices.close()
        assert not any(each.is_set() for each in cancelled)  # there is nothing left to cancel
        return found

    assert asyncio.run(read()) == [(1, "a"), (0, "b"), (1, "c"), (0, "d")]


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (piece("x", "error", "logits are not finite"), 500, "generation_failed"),
        (piece("x", "cancelled"), 503, "stopping"),
        (None, 408, "timeout"),
    ],
)
def test_a_choice_that_fails_ends_all_of_them(last, status, code):
    async def read() -> None:
        made, cancelled = streams(2)
        choices = Choices(made, asyncio.get_running_loop().time() + 0.2, Stream.__aiter__)
        if last is not None:
            made[1].put(last)
        with pytest.raises(ApiError) as caught:
            await choices.all_results()
        choices.close()
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert cancelled[0].is_set()

    asyncio.run(read())


@pytest.mark.parametrize("cause", [None, "OSError: /dev/sda is full"])
def test_what_was_raised_is_told_to_the_log_alone(cause, caplog):
    """The log has both, with the request's id."""

    async def read() -> str:
        made, _ = streams(1)
        choices = Choices(made, None, Stream.__aiter__, "req-1")
        made[0].put(piece("x", "error", "decoding failed", cause))
        with pytest.raises(ApiError) as caught:
            await choices.all_results()
        choices.close()
        return caught.value.detail

    told = asyncio.run(read())
    assert told == (
        "decoding failed"
        if cause is None
        else "the server could not compute the answer (decoding failed); its log says why, under req-1"
    )
    assert f"request req-1 could not be answered: decoding failed ({cause})" in caplog.text


def test_an_exception_on_the_way_is_not_lost():
    async def broken(stream: Stream):
        yield piece("x")
        raise RuntimeError("a clock stands still")

    async def read() -> None:
        choices = Choices(streams(1)[0], None, broken)
        with pytest.raises(RuntimeError, match="clock"):
            await choices.all_results()
        choices.close()

    asyncio.run(read())


def test_a_client_that_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr(chat, "LAST_WORDS_SECONDS", 0.1)

    async def stuck() -> None:
        made, cancelled = streams(1)
        choices = Choices(made, asyncio.get_running_loop().time() + 0.1, Stream.__aiter__)

        async def content():
            yield b"data: {}\n\n"

        async def never(*message: object) -> None:
            await asyncio.Event().wait()

        events = chat.Events(choices, content())
        await asyncio.wait_for(events({"type": "http", "asgi": {"spec_version": "2.3"}}, never, never), 5)
        assert cancelled[0].is_set()

    asyncio.run(stuck())
