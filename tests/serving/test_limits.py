"""Key, gate and body limits, around an app that says what it got; and what uvicorn makes of slow connections."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request

from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.errors import add_error_handlers
from jaxspec.serving.http.limits import SPARE, Admit, Gate, add_limits
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import EngineSettings
from tests.serving.listening import Listening, error_in, eventually, talk

KEY = "sk-of-the-tests"
PATHS = (
    "/ready",
    "/metrics",
    "/v1/models",
    "/v1/chat/completions",
    "/ui/",
    "/nowhere",
    "/health/",
    "//health",
    "/HEALTH",
)


def make(gate: Gate, **settings) -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)
    add_limits(app, HttpSettings(**settings), gate)

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    @app.post("/wait")
    async def wait(request: Request) -> dict[str, bool]:
        """Until the client has gone."""
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return {"gone": True}

    @app.post("/deaf")
    async def deaf() -> dict[str, bool]:
        raise RuntimeError("not read, not caught")

    for path in ("/health", "/ready", "/metrics"):
        app.get(path)(lambda: {"ok": True})
    return app


def asked(app: FastAPI, method: str, path: str, **options) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        KEY,
        f"Token {KEY}",
        "Bearer \xff\xfe",
        "Basic",
        "Basic %",
    ],
)
def test_without_the_key_every_path_but_health_is_401(path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = asked(make(Gate(9), api_key=KEY), "GET", path, headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert KEY not in response.text


def test_health_needs_no_key_and_without_a_key_nothing_does():
    assert asked(make(Gate(9), api_key=KEY), "GET", "/health").status_code == 200
    assert asked(make(Gate(9)), "GET", "/metrics").status_code == 200


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}", f"bearer  {KEY} ", "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()]
)
def test_the_key_opens(header):
    response = asked(make(Gate(9), api_key=KEY), "POST", "/echo", headers={"Authorization": header}, content=b"1234")
    assert response.json() == {"length": 4}


def test_a_browser_is_told_how_it_can_give_the_key():
    response = asked(make(Gate(9), api_key=KEY), "GET", "/ui/", headers={"Accept": "text/html,*/*"})
    assert response.status_code == 401 and response.headers["www-authenticate"] == 'Basic realm="jaxspec"'


@pytest.mark.parametrize("key", ["", "nächste", "a\nb"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(ValueError, match="printable ASCII"):
        HttpSettings(api_key=key)


def test_settings_do_not_show_the_key():
    assert KEY not in repr(HttpSettings(api_key=KEY))


def test_a_body_may_be_as_large_as_the_limit_and_no_larger():
    app = make(Gate(9), max_body_bytes=100)
    assert asked(app, "POST", "/echo", content=bytes(100)).json() == {"length": 100}
    for content in (bytes(101), parts(60, 60)):  # with its length said, and without
        response = asked(app, "POST", "/echo", content=content)
        assert response.status_code == 413
        assert error_of(response)["message"] == "the body has more than 100 bytes"


async def parts(*sizes: int, seconds: float = 0.0):
    for size in sizes:
        await asyncio.sleep(seconds)
        yield bytes(size)


def test_a_closed_gate_lets_nobody_in_and_says_when_to_try_again():
    gate = Gate(9)
    app = make(gate)
    gate.closed = True
    response = asked(app, "POST", "/echo")
    assert response.status_code == 503 and error_of(response)["code"] == "stopping"
    assert int(response.headers["retry-after"]) > 0
    assert [asked(app, "GET", path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


@pytest.mark.parametrize(
    ("page", "method", "path", "counted"),
    [
        ("/gradio_api/heartbeat/", "GET", "/gradio_api/heartbeat/abc", False),
        ("/ui/gradio_api/heartbeat/", "GET", "/ui/gradio_api/heartbeat/abc", False),
        (None, "GET", "/gradio_api/heartbeat/abc", True),  # where there is no page
        ("/gradio_api/heartbeat/", "POST", "/gradio_api/heartbeat/abc", True),
        ("/gradio_api/heartbeat/", "GET", "/v1/models/gradio_api/heartbeat/abc", True),
        ("/gradio_api/heartbeat/", "GET", "/ui/gradio_api/heartbeat/abc", True),
        ("/gradio_api/heartbeat/", "GET", "/gradio_api/heartbeat", True),
        ("/gradio_api/heartbeat/", "GET", "/other", True),
    ],
)
def test_only_a_heartbeat_of_the_web_page_that_is_there_is_not_waited_for(page, method, path, counted):
    """It lasts as long as a browser's tab is open."""
    gate = Gate(1)
    gate.heartbeat = page
    app = make(gate)

    async def say(rest: str) -> dict[str, int]:
        return {"inside": gate.inside, "beating": gate.beating}

    app.add_api_route("/{rest:path}", say, methods=["GET", "POST"])
    assert asked(app, method, path).json() == {"inside": int(counted), "beating": int(not counted)}
    assert gate.inside == gate.beating == 0
    gate.inside = gate.beating = 1  # as many as may
    assert asked(app, method, path).status_code == 429
    gate.closed = True
    assert asked(app, method, path).status_code == (503 if counted else 429)


def test_a_full_gate_refuses_before_the_body_is_read():
    gate = Gate(1)
    gate.inside = 1
    response = asked(make(gate), "POST", "/echo", content=bytes(10))
    assert response.status_code == 429 and error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) > 0 and gate.inside == 1


def test_an_exception_leaves_the_gate_as_well():
    gate = Gate(1)
    response = asked(make(gate), "POST", "/deaf")
    assert response.status_code == 500 and error_of(response)["type"] == "server_error" and gate.inside == 0


@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_that_is_cut_off_at_the_very_end_is_told_so_where_it_has_not_begun(begun):
    """uvicorn cancels what is left when it ends; an engine that hangs must not keep that from happening."""
    gate, sent = Gate(1), []

    async def hanging(scope, receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(100)

    async def send(message):
        sent.append(message)

    async def ended() -> None:
        scope = {"type": "http", "path": "/v1/chat/completions", "headers": []}
        task = asyncio.create_task(Admit(hanging, gate)(scope, None, send))
        await asyncio.sleep(0.01)
        assert gate.inside == 1
        gate.closed = True
        task.cancel()
        await asyncio.wait_for(task, 5)

    asyncio.run(ended())
    assert gate.inside == 0 and sent[0]["status"] == (200 if begun else 503)
    if not begun:
        assert json.loads(sent[1]["body"])["error"]["code"] == "stopping"


def test_the_gate_is_as_wide_as_slots_and_queue():
    assert Gate.of(EngineSettings(max_num_seqs=3, max_queued_requests=5)).limit == 8 + SPARE


GATE = Gate(50)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = make(GATE, max_body_bytes=100_000, body_timeout=0.6)
    with Listening(app, http=limited_protocol(0.5, 0.8), timeout_keep_alive=2) as port:
        yield port


def test_headers_that_dribble_in_are_408(port):
    headers = b"POST /echo HTTP/1.1\r\nHost: a\r\nX-Slow: " + 100 * b"y"
    received, seconds = talk(port, [bytes([each]) for each in headers], 0.05)
    assert received.startswith(b"HTTP/1.1 408 ") and error_in(received)["code"] == "header_timeout"
    assert 0.4 < seconds < 1.5


def test_a_connection_that_says_nothing_is_closed(port):
    received, seconds = talk(port, [], 0.05)
    assert received == b"" and 0.4 < seconds < 1.5


def test_headers_of_a_second_request_have_no_longer(port):
    first = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    received, seconds = talk(port, [first, *(bytes([each]) for each in first[:-1] + 100 * b"y")], 0.05)
    assert received.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in received
    assert seconds < 2


def test_an_idle_connection_is_kept_for_the_next_request_and_not_for_ever(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            assert client.get("/health").status_code == 200
            time.sleep(0.9)  # longer than headers may take
    received, seconds = talk(port, [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"], 0.1)
    assert received.startswith(b"HTTP/1.1 200 ") and 1.8 < seconds < 4


def test_a_body_that_dribbles_in_is_408(port):
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
    received, seconds = talk(port, [head, *(1000 * [b"x"])], 0.05)
    assert received.startswith(b"HTTP/1.1 408 ") and error_in(received)["code"] == "body_timeout"
    assert 0.5 < seconds < 1.6 and GATE.inside == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_writes_before_it_reads_is_told_413(port, chunked):
    content = parts(*(40 * [200_000])) if chunked else bytes(8_000_000)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.post(f"http://127.0.0.1:{port}/echo", content=content)

    response = asyncio.run(ask())
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


def test_whoever_never_stops_sending_a_refused_body_is_cut_off(port):
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"
    received, seconds = talk(port, [head, *(200 * [bytes(1000)])], 0.05)
    assert received.startswith(b"HTTP/1.1 413 ") and 0.6 < seconds < 2


def test_a_client_that_goes_while_it_sends_leaves_nothing_behind(port):
    for head in (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc",
        b"POST /wait HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(head)
            assert eventually(lambda: GATE.inside == 1, 5)
        assert eventually(lambda: GATE.inside == 0, 5)


@pytest.mark.parametrize(
    "head", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + bytes(70_000), b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_http_is_400(port, head):
    received, _ = talk(port, [head], 0.05)
    assert received.startswith(b"HTTP/1.1 400 ") and error_in(received)["code"] == "invalid_http"
