"""The door: names of the server, websockets, the id of a request."""

import asyncio
import logging
import re

import httpx
import pytest
from fastapi import FastAPI

from jaxspec.cli.commands import read_command
from jaxspec.serving.http.errors import add_error_handlers
from jaxspec.serving.http.limits import Gate, add_limits
from jaxspec.serving.http.settings import HttpSettings

SECRET = "the weights are in /home/ann"


def make(**settings) -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)
    add_limits(app, HttpSettings(**settings), Gate(9))
    app.get("/health")(lambda: {"ok": True})
    app.get("/v1/models")(lambda: {"ok": True})

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError(SECRET)

    return app


def asked(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


OWN = ("localhost", "127.0.0.1", "[::1]")


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:8000", "localhost.:80", "127.0.0.1", "127.0.0.1:8000", "[::1]:80"],
)
def test_the_own_names_are_let_in(host):
    assert asked(make(allowed_hosts=OWN), "/v1/models", Host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "attacker.example",
            "attacker.example:8000",
            "localhost.attacker.example",
            "127.0.0.1.nip.io:8000",
            "localhost@a",
        ),
        *("notlocalhost", "127.0.0.2", "[::2]", "::1", "", "localhost:8000:9", "localhost, attacker.example", "[::1"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nowhere"])
def test_a_name_that_was_made_to_point_here_is_refused(host, path):
    response = asked(make(allowed_hosts=OWN), path, Host=host)
    error = response.json()["error"]
    assert response.status_code == 403 and error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]
    assert error["type"] == "permission_error"


@pytest.mark.parametrize("hosts", [(), ("*",), ("a.example", "*")])
def test_any_name_may_be_allowed(hosts):
    assert asked(make(allowed_hosts=hosts), "/v1/models", Host="attacker.example").status_code == 200


@pytest.mark.parametrize("given", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_addresses_are_compared_as_addresses(given):
    assert HttpSettings(allowed_hosts=(given,)).allowed_hosts == ("[::1]",)


@pytest.mark.parametrize("given", ["", "a.example:80", "http://a.example", "*.a.example", "a b", "[::1]:80"])
def test_what_is_no_name_is_refused_at_once(given):
    with pytest.raises(ValueError, match="an allowed host is a name such as example.org, without a port"):
        HttpSettings(allowed_hosts=(given,))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {*OWN}),
        ("--host ::1", {*OWN}),
        ("--host 127.0.0.9", {*OWN, "127.0.0.9"}),
        ("--api-key k", set()),
        ("--host 0.0.0.0", set()),
        ("--host 0.0.0.0 --allowed-hosts a.example", {"a.example"}),
        ("--allowed-hosts a.example --allowed-hosts B.example", {"a.example", "b.example"}),
        ("--api-key k --allowed-hosts a.example", {"a.example"}),
    ],
)
def test_a_server_of_this_machine_without_a_key_has_its_own_names_only(options, expected, monkeypatch):
    monkeypatch.delenv("JAXSPEC_API_KEY", raising=False)
    serve = read_command(["serve", *options.split()], "test")
    assert set(serve.http_settings().allowed_hosts) == expected


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/health"])
def test_websockets_are_closed(key, path):
    sent = []

    async def ask() -> None:
        async def send(message) -> None:
            sent.append(message)

        app = make(api_key=key)
        app.mount("/", lambda *scope: pytest.fail("reached"))
        await app({"type": "websocket", "path": path, "headers": []}, None, send)

    asyncio.run(ask())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_every_answer_has_an_id_and_what_is_not_told_is_found_under_it(caplog):
    app = make(allowed_hosts=("test",), api_key="k")
    names = {asked(app, path).headers["x-request-id"] for path in ("/health", "/v1/models", "/nowhere")}
    assert len(names) == 3 and all(re.fullmatch("req-[0-9a-f]{24}", name) for name in names)
    with caplog.at_level(logging.ERROR):
        response = asked(app, "/broken", Authorization="Bearer k")
    name = response.headers["x-request-id"]
    assert response.status_code == 500
    assert response.json()["error"]["message"] == f"the server failed to answer; its log says why, under {name}"
    assert SECRET not in response.text and f"request {name} failed" in caplog.text
