"""The web page inside the server: behind the same key, within the same limits, beside the same API."""

import json
from collections.abc import Iterator

import httpx
import pytest

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.page import mount_page
from tests.serving.listening import Listening, eventually

KEY = "sk-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
BROWSER = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    app = make_app(engine, HttpSettings(served_model_name="demo", api_key=KEY))
    with Listening(mount_page(app, engine, name="demo")) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_browser_is_asked_for_the_key_and_then_has_the_page(url):
    asked = httpx.get(f"{url}/", headers=BROWSER)
    assert asked.status_code == 401 and asked.headers["www-authenticate"] == 'Basic realm="jaxspec"'
    assert httpx.get(f"{url}/config").status_code == 401
    for password, status in ((KEY, 200), ("wrong", 401)):
        with httpx.Client(auth=("anybody", password), headers=BROWSER) as client:
            assert client.get(f"{url}/").status_code == client.get(f"{url}/config").status_code == status


def test_the_api_beside_it_is_the_same(url):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "demo"
    assert httpx.get(f"{url}/ready", headers=headers).json() == {"status": "ready"}
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/nothing", headers=headers).status_code == 404


def asked_on(url: str, question: str) -> str:
    """All that the page shows of an answer."""
    with httpx.Client(base_url=url, headers=HEADERS, timeout=120) as client:
        functions = client.get("/config").json()["dependencies"]
        ask = next(each["id"] for each in functions if each["api_name"] == "ask")
        session = f"s{len(question)}"
        joined = {"fn_index": ask, "data": [None, question, 0, 0, 300], "session_hash": session}
        assert client.post("/gradio_api/queue/join", json=joined).status_code == 200
        told = ""
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
            for line in events.iter_lines():
                told += line
                if line.startswith("data:") and json.loads(line[5:])["msg"] in ("process_completed", "close_stream"):
                    return told
    raise AssertionError(told)


def test_a_question_on_the_page_has_the_bounds_of_one_over_http(url):
    told = asked_on(url, 3_000_000 * "a")
    assert "The prompt has 3000000 characters, more tokens than fit" in told
    assert "more tokens than fit" not in asked_on(url, "What is a chart for?")


def test_an_answer_on_the_page_may_take_as_long_as_one_over_http(engine):
    app = make_app(engine, HttpSettings(api_key=KEY, request_timeout=0.05))
    with Listening(mount_page(app, engine)) as port:
        assert "The answer took longer than this server allows." in asked_on(f"http://127.0.0.1:{port}", "What is it?")
        assert eventually(lambda: engine.stats().running == engine.stats().waiting == 0, 30)


def test_the_page_that_is_there_says_where_its_tabs_stay_open(engine, url):
    app = make_app(engine)
    assert app.state.gate.heartbeat is None
    mount_page(app, engine, path="/page")
    assert app.state.gate.heartbeat == "/page/gradio_api/heartbeat/"
    with httpx.stream("GET", f"{url}/gradio_api/heartbeat/s1", headers=HEADERS, timeout=20) as beat:
        assert beat.status_code == 200
