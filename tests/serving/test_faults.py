"""Whatever a client does wrong has one exact status, costs nobody else anything, and leaves the slots free."""

import base64
import concurrent.futures
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from jaxspec import demo
from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.settings import HttpSettings
from tests.serving.listening import Listening, eventually

KEY = "sk-of-the-tests"
QUESTION = "Describe the picture."
IMAGE = "messages.0.content.0.image_url"
TEXT_LIMIT = 10_000_000


@pytest.fixture(scope="module")
def app(engine):
    settings = HttpSettings(
        served_model_name="demo",
        api_key=KEY,
        max_body_bytes=16_000_000,
        max_images=4,
        allowed_media_domains=("localhost", "127.0.0.1"),
    )
    return make_app(engine, settings)


@pytest.fixture(scope="module")
def port(app) -> Iterator[int]:
    with Listening(app, http=limited_protocol(5.0)) as port:
        yield port


@pytest.fixture
def client(port) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def left_as_it_was(engine, app) -> Iterator[None]:
    """After every test the slots, the queue and the gate are empty."""
    yield
    assert eventually(lambda: engine.stats().running == engine.stats().waiting == app.state.gate.inside == 0, 30)


def body(content, **parameters) -> dict:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0} | parameters


def ask(client: httpx.Client, content, **parameters) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body(content, **parameters))


def with_image(url: str) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refused(response: httpx.Response, status: int, param: str | None) -> dict:
    """The error, which is OpenAI's in shape and names what is wrong."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert KEY not in response.text
    return error


def picture(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises more."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


BAD_IMAGES = {
    "bomb": (data_url(png_that_says(9000, 9000)), "81000000|9000 x 9000"),
    "bomb of a billion": (data_url(png_that_says(40_000, 40_000)), "pixels"),
    "too narrow": (data_url(png_that_says(1, 1000)), "one side may be"),
    "header only": (data_url(png_that_says(40, 30)), "cannot be read"),
    "truncated PNG": (data_url(picture("PNG")[:-200]), "cannot be read"),
    "truncated JPEG": (data_url(picture("JPEG", (400, 300))[:500], "image/jpeg"), "cannot be read"),
    "text that says it is a PNG": (data_url(b"no picture at all"), "cannot be read"),
    "PDF": (data_url(b"%PDF-1.7\n1 0 obj\n"), "cannot be read"),
    "SVG": (data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"), "cannot be read"),
    "EPS": (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), "EPS|cannot be read"),
    "empty": (data_url(b""), "cannot be read"),
    "base64 garbage": ("data:image/png;base64,!!!not base64!!!", "not valid base64"),
    "base64 cut short": ("data:image/png;base64,iVBORw0KGg=A", "not valid base64"),
    "base64 of other letters": ("data:image/png;base64,\u0416\u0416\u0416\u0416", "base64|ASCII"),
    "not base64": ("data:image/png,%89PNG", "not base64"),
    "nothing behind data:": ("data:", "not base64"),
    "a file": ("file:///etc/passwd", "neither data:, http: nor https:"),
    "a path": ("/etc/passwd", "neither data:, http: nor https:"),
    "a host that is not allowed": ("http://example.org/a.png", "not allowed"),
    "a name that is this machine": ("http://localhost/a.png", "without a public address"),
    "an address that is this machine": ("http://127.0.0.1/a.png", "without a public address"),
    "a port of this machine": ("http://127.0.0.1:8000/a.png", "port that is not allowed"),
    "metadata of a cloud": ("http://169.254.169.254/latest/meta-data/", "not allowed"),
    "a password": ("http://user:hunter2@localhost/a.png", "user name or password"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_are_none_are_400(client, name):
    url, said = BAD_IMAGES[name]
    started = time.monotonic()
    error = refused(ask(client, with_image(url), max_tokens=4), 400, IMAGE)
    assert any(each in error["message"] for each in said.split("|")) and "image 1" in error["message"]
    assert "hunter2" not in error["message"] and len(error["message"]) < 600
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_counts_for_what_it_is_whatever_is_said_of_it(client, kind):
    response = ask(client, with_image(data_url(picture(kind), "text/plain")), max_tokens=4)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 4


def test_the_second_picture_is_named_where_the_second_is_bad(client):
    good, bad = with_image(data_url(picture("PNG"))), with_image(data_url(b"x"))
    error = refused(ask(client, [good[0], bad[0], good[1]], max_tokens=4), 400, "messages.0.content.1.image_url")
    assert "image 2" in error["message"]


def test_too_many_pictures(client):
    parts = 5 * with_image(data_url(picture("PNG")))[:1]
    error = refused(ask(client, parts, max_tokens=4), 400, "messages.0.content.4.image_url")
    assert error["code"] == "too_many_images"


@pytest.mark.parametrize(
    "name", ["words", "one word", "no spaces between characters", "messages", "control characters"]
)
def test_ten_megabytes_of_prompt_are_400_and_hold_up_nobody(client, port, name):
    text = {
        "words": TEXT_LIMIT // 6 * "word, ",
        "one word": TEXT_LIMIT * "a",
        "no spaces between characters": TEXT_LIMIT // 3 * "\u6f22",
        "control characters": TEXT_LIMIT // 6 * "\x00",
        "messages": "",
    }[name]
    asked = body(text, max_tokens=4)
    if name == "messages":
        asked["messages"] = TEXT_LIMIT // 34 * [{"role": "user", "content": "x"}]
    content = json.dumps(asked, ensure_ascii=name == "control characters").encode()
    assert len(content) > 0.9 * TEXT_LIMIT
    waits = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        headers = {"Content-Type": "application/json"}
        answer = pool.submit(client.post, "/v1/chat/completions", content=content, headers=headers)
        while not answer.done():
            started = time.monotonic()
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
            waits.append(time.monotonic() - started)
            time.sleep(0.02)
    assert answer.result().status_code == 400, answer.result().text[:300]
    assert len(answer.result().content) < 1000
    assert max(waits) < 3  # seconds; other requests are answered meanwhile


def test_a_body_beyond_the_limit_is_413(client):
    refused(ask(client, 16_000_001 * "a"), 413, None)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"tempature": 0.5}, "tempature"),
        ({"__proto__": {}}, "__proto__"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"stream_options": {"include_usages": True}, "stream": True}, "stream_options.include_usages"),
    ],
)
def test_fields_that_are_not_known_or_not_honoured_are_400_by_name(client, parameters, param):
    refused(ask(client, "Hello.", max_tokens=4, **parameters), 400, param)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}0"}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics", "/ready", "/openapi.json", "/x"])
def test_a_wrong_key_is_401_everywhere(port, header, path):
    refused(httpx.post(f"http://127.0.0.1:{port}{path}", headers=header, json=body("Hello.")), 401, None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%00", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(client, method, path, status):
    refused(client.request(method, path), status, None)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b'{"model": ' + 100_000 * b"[", "application/json", 400),
        (b'{"temperature": NaN}', "application/json", 400),
        (b"model=demo", "application/x-www-form-urlencoded", 415),
        (json.dumps(body("Hello.")).encode(), "text/plain", 415),
    ],
)
def test_bodies_that_are_no_json(client, content, kind, status):
    response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status and set(response.json()) == {"error"}


def test_clients_that_leave_at_any_point_give_their_slots_back(client, engine, app, port):
    """While the body is sent, in the queue, before the first token, in the middle of a stream; politely and not."""
    content = with_image(data_url(demo.picture_path().read_bytes()))
    expected = ask(client, content, max_tokens=24).json()["choices"][0]["message"]["content"]
    sent = json.dumps(body(content, max_tokens=200, min_tokens=200, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    request, rng = head.encode() + sent, random.Random(0)
    connections = []
    for number in range(16):
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        whole = rng.random() < 0.8
        connection.sendall(request if whole else request[: rng.randrange(len(request))])
        if whole and rng.random() < 0.6:
            for _ in range(rng.randrange(1, 4)):
                connection.recv(rng.choice((1, 100, 2000)))
        if rng.random() < 0.3:  # a reset in place of a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if number % 3:
            connection.close()
        else:
            connections.append(connection)
    assert engine.stats().running + engine.stats().waiting > 0
    for connection in connections:
        connection.close()
    assert eventually(lambda: engine.stats().running == engine.stats().waiting == app.state.gate.inside == 0, 30)
    assert ask(client, content, max_tokens=24).json()["choices"][0]["message"]["content"] == expected
