"""What goes wrong inside is one request's: it gets 500 and hears nothing of the inside, the others get their answers,
and neither pictures nor keys reach a log."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import logging
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.media import RemoteMedia, is_public
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.targets.images import ImageLayout
from tests.serving.asking import MODEL, ONE, TOKENS, picture
from tests.serving.listening import Listening, eventually
from tests.serving.test_media import HOST, serving

KEY = "sk-of-the-tests-of-faults"
IMAGE = "messages.0.content.0.image_url"
NOT_FINITE, MISSHAPEN, UNEXPECTED = "not finite", "misshapen", "unexpected"
INSIDE = "a token of ann's in /home/ann"


@pytest.fixture(scope="module")
def app(engine):
    """An app whose prompts are spoilt on their way to the engine where their words say so: what the target makes of
    such pixels is its own."""
    app = make_app(engine, HttpSettings(api_key=KEY, allowed_media_domains=(HOST,)))
    encode = app.state.encoder.encode

    async def spoilt(messages):
        prompt, words = await encode(messages), messages[-1].content
        fault = words if isinstance(words, str) else words[-1].text
        if fault == UNEXPECTED:
            raise RuntimeError(INSIDE)
        if fault not in (NOT_FINITE, MISSHAPEN):
            return prompt
        layout = prompt.images[0]
        pixels = np.full_like(layout.pixels, np.nan) if fault == NOT_FINITE else layout.pixels[..., :1, :1]
        return dataclasses.replace(prompt, images=[ImageLayout(pixels, layout.index, layout.table_size)])

    app.state.encoder.encode = spoilt
    return app


@pytest.fixture(scope="module")
def url(app) -> Iterator[str]:
    with Listening(app, http=limited_protocol(5.0)) as port:
        yield f"http://127.0.0.1:{port}/v1/chat/completions"


def ask(url: str, words: str | None = None, image: str | None = None, key: str = KEY, **more) -> httpx.Response:
    messages = ONE
    if words is not None:
        parts = [{"type": "image_url", "image_url": {"url": picture(1) if image is None else image}}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": TOKENS} | more
    return httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fault", [NOT_FINITE, MISSHAPEN, UNEXPECTED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_is_500_for_one_request_and_nothing_for_the_others(app, engine, url, expected, fault, stream, caplog):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        before = [pool.submit(ask, url) for _ in range(2)]
        response = ask(url, fault, stream=stream)
        after = pool.submit(ask, url)
        assert [text_of(each.result()) for each in (*before, after)] == 3 * [expected["one image"].text]
    assert response.status_code == 500 and response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    name = response.headers["x-request-id"]
    assert (error["type"], error["param"]) == ("server_error", None)
    assert error["code"] == ("internal_error" if fault == UNEXPECTED else "generation_failed")
    for inside in (INSIDE, "Error:", "shape", "Traceback", ".py"):
        assert inside not in error["message"]
    if fault == NOT_FINITE:
        assert "are not finite (NaN or infinity)" in error["message"]
    else:
        assert error["message"].endswith(f"its log says why, under {name}")
    assert name in caplog.text
    assert eventually(lambda: engine.stats().running == engine.stats().waiting == app.state.gate.inside == 0, 30)


def test_a_choice_that_fails_in_the_middle_of_a_stream_is_its_last_event(engine, url, expected, monkeypatch, caplog):
    whole, rounds = type(engine._slots).run, []

    def run(slots, tree, count):
        rounds.append(count)
        if len(rounds) == 3:
            raise RuntimeError(INSIDE)
        return whole(slots, tree, min(count, 2))

    monkeypatch.setattr(type(engine._slots), "run", run)
    response = ask(url, stream=True, max_tokens=200, min_tokens=200)
    assert response.status_code == 200 and "[DONE]" not in response.text
    name = response.headers["x-request-id"]
    last = response.text.strip().rsplit("data: ", 1)[1]
    assert '"code": "generation_failed"' in last and name in last and INSIDE not in response.text
    assert f"request {name}" in caplog.text and INSIDE in caplog.text
    assert text_of(ask(url)) == expected["one image"].text


@pytest.fixture(scope="module")
def public() -> Iterator:
    with serving("127.0.0.1") as server:
        yield server


@pytest.fixture(scope="module")
def private(public) -> Iterator:
    with serving("127.0.0.2", public.server_port) as server:
        yield server


class Watched(RemoteMedia):
    """Notes what is fetched and when that ends, whatever comes of it."""

    begun: list[str] = []
    ended: list[str] = []

    async def fetch(self, url: str, name: str = "image 1") -> bytes:
        self.begun.append(url)
        try:
            return await super().fetch(url, name)
        finally:
            self.ended.append(url)


@pytest.fixture
def resolving(app, public, private, monkeypatch):
    """Lets the app's look-ups answer in turn; 127.0.0.1 counts as an address of the public internet."""
    public.asked.clear()
    private.asked.clear()

    def resolve(*answers: str) -> None:
        left = list(answers)
        remote = Watched(
            domains=(HOST,),
            ports=(public.server_port,),
            resolve=lambda host, port: [left.pop(0)],
            allowed=lambda address: address == "127.0.0.1" or is_public(address),
        )
        monkeypatch.setattr(app.state.encoder, "remote", remote)
        Watched.begun.clear()
        Watched.ended.clear()

    return resolve


@pytest.mark.parametrize(
    ("answers", "path", "said"),
    [
        (["169.254.169.254"], "/latest/meta-data/", "image 1 is on a host without a public address"),
        (["10.0.0.1"], "/a.png", "image 1 is on a host without a public address"),
        (["127.0.0.2"], "/a.png", "image 1 is on a host without a public address"),
        (["127.0.0.1"], "/redirect?http://127.0.0.2:{port}/secret", "image 1 is on a host that is not allowed"),
        (["127.0.0.1"], "/redirect?http://169.254.169.254/", "image 1 is on a host that is not allowed"),
        (["127.0.0.1", "127.0.0.2"], "/redirect?/a.png", "image 1 is on a host without a public address"),  # rebound
        (["127.0.0.1", "127.0.0.2"], "/a.png", "image 1 cannot be read"),  # the second answer is not asked for
    ],
)
def test_urls_that_lead_inside_are_400(url, resolving, public, private, answers, path, said):
    resolving(*answers)
    address = f"http://{HOST}:{public.server_port}{path.format(port=public.server_port)}"
    response = ask(url, "What is this?", address)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == IMAGE and error["message"].startswith(said)
    assert not private.asked and "127.0.0.2" not in error["message"] and "169.254" not in error["message"]


def test_where_one_picture_cannot_be_had_the_others_are_not_fetched_any_longer(url, resolving, public):
    resolving("127.0.0.1")
    slow, elsewhere = f"http://{HOST}:{public.server_port}/drip", "http://elsewhere.example/a.png"
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in (slow, elsewhere)]
    response = ask(url, messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400 and "image 2 is on a host that is not allowed" in response.text
    assert sorted(Watched.ended) == sorted(Watched.begun) and elsewhere in Watched.ended


def test_neither_pictures_nor_the_key_are_logged(engine, app, url, expected, resolving, caplog, capfd):
    """Not for good requests, not for bad ones, not where something fails."""
    resolving("127.0.0.1")
    noise = np.random.default_rng(5).integers(0, 256, (40, 40, 3), np.uint8)
    content = png(noise)
    good = "data:image/png;base64," + base64.b64encode(content).decode()
    broken = good[: len(good) // 2 // 4 * 4]
    with caplog.at_level(logging.DEBUG):
        statuses = [
            ask(url, "What is this?", good).status_code,
            ask(url, "What is this?", good, stream=True).status_code,
            ask(url, "What is this?", good, key=f"{KEY}0").status_code,
            ask(url, "What is this?", broken).status_code,
            ask(url, "What is this?", good[:-3] + "!!!").status_code,
            ask(url, "What is this?", good.removeprefix("data:")).status_code,
            ask(url, good, good).status_code,  # words that are too many
            ask(url, "What is this?", good, unknown=good).status_code,
            ask(url, "What is this?", good, temperature=good).status_code,
            ask(url, "What is this?", good, user=good).status_code,
            ask(url, "What is this?", {"url": good}).status_code,
            httpx.post(url, content=good, headers={"Authorization": f"Bearer {KEY}"}).status_code,
            httpx.get(f"{url}?key={KEY}", headers={"Authorization": KEY}).status_code,
            *(ask(url, fault, good).status_code for fault in (NOT_FINITE, MISSHAPEN, UNEXPECTED)),
        ]
    assert statuses == [200, 200, 401, 400, 400, 400, 400, 400, 400, 400, 400, 415, 401, 500, 500, 500]
    told = capfd.readouterr()
    logged = caplog.text + told.out + told.err
    assert "failed" in logged  # there is something to look through
    payload = good.partition(",")[2]
    pieces = [payload[start : start + 40] for start in range(0, len(payload) - 40, 40)]
    own = [line for line in logged.splitlines() if "httpx" not in line]  # the test's own client tells its addresses
    for secret in (KEY, *pieces, repr(content[40:60])[2:-1], str(noise[0, :4].ravel().tolist())[1:-1]):
        assert not any(secret in line for line in own), secret[:10]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_an_engine_that_is_broken_says_no_more_than_that(engine, monkeypatch):
    app = make_app(engine)
    monkeypatch.setattr(engine, "failure", f"the engine has stopped: RuntimeError: {INSIDE}")

    async def health() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/health")

    response = asyncio.run(health())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine has stopped; the server's log says why"
