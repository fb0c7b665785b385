"""The web page inside the server: behind the same key, beside the same API."""

from collections.abc import Iterator

import httpx
import pytest

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.page import mount_page
from tests.serving.listening import Listening

KEY = "sk-of-the-tests"
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
