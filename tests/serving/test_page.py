"""The web page in a real browser, on the embedded model; and what it lets nobody do."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from playwright.sync_api import Browser, Page, expect

import jaxspec
from jaxspec import demo
from jaxspec.colours import TokenColours
from jaxspec.serving.engine import Engine
from jaxspec.serving.page import mount_page
from jaxspec.serving.requests import EngineSettings
from tests.serving.browser import running_browser, served

SECONDS = 120_000  # ms: for programs to be compiled, on a busy machine
KEY = "a key with ümläuts"


class Talkative(Engine):
    """An engine whose answers can be made long, so that there is time to watch and to leave."""

    least = 0

    def submit(self, prompt, sampling, max_new_tokens, *rest, **options):
        if self.least:
            sampling, max_new_tokens = dataclasses.replace(sampling, min_tokens=self.least), self.least
        return super().submit(prompt, sampling, max_new_tokens, *rest, **options)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    target = jaxspec.load_target(demo.target_path())
    drafter = jaxspec.load_drafter(demo.drafter_path("vispec"), target)
    settings = EngineSettings(max_length=1024, max_num_seqs=2, adaptive=False)  # the whole tree, whatever pays
    with Talkative(target, drafter, settings=settings) as running:
        until(lambda: running.ready, "the engine is not ready", seconds=300)
        yield running


@pytest.fixture
def talkative(engine) -> Iterator[Engine]:
    engine.least = 700
    yield engine
    engine.least = 0


@pytest.fixture(scope="module")
def address(engine) -> Iterator[str]:
    with served(mount_page(FastAPI(), engine)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    page = opened(browser, address)
    yield page
    page.close()


def opened(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(address)
    expect(page.locator("#ask")).to_be_visible(timeout=60_000)
    return page


def upload(page: Page, path) -> None:
    page.set_input_files("#picture input[type=file]", path)
    expect(page.locator("#picture img")).to_be_visible(timeout=60_000)


def answered(page: Page, panels: int = 1) -> None:
    expect(page.locator('.panel[data-state="over"]')).to_have_count(panels, timeout=SECONDS)
    expect(page.locator("#ask")).to_be_enabled(timeout=60_000)


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


def by_character(runs) -> list[tuple[str, str]]:
    """What belongs to each character, however runs are cut."""
    return [(character, kind) for text, kind in runs for character in text]


def test_a_picture_is_uploaded_and_asked_about(page, engine):
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    upload(page, demo.picture_path())
    page.click("#ask")
    answered(page)

    expected = jaxspec.Generator(engine.target, engine.drafter, max_length=1024).generate(
        "Describe the picture.", [demo.picture_path()]
    )
    assert page.locator(".answer").inner_text() == expected.text
    drafted, own = page.locator(".answer .draft"), page.locator(".answer .own")
    shown = page.locator(".answer span").evaluate_all("all => all.map(each => [each.textContent, each.className])")
    colours = TokenColours()
    colours.add(expected.text_ends, expected.accepted)
    runs = [(text, "draft" if drafted else "own") for text, drafted in colours.split(expected.text)]
    assert by_character(shown) == by_character(runs) and drafted.count() and own.count()
    colours = [
        page.evaluate("each => getComputedStyle(each).borderBottom", each.first.element_handle())
        for each in (drafted, own)
    ]
    assert "solid" in colours[0] and "dotted" in colours[1] and colours[0].split("rgb")[1] != colours[1].split("rgb")[1]
    expect(page.locator(".legend")).to_have_text("accepted draft tokensthe target's own tokens")

    numbers = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert numbers["tokens"] == str(len(expected.tokens))
    assert numbers["mean acceptance length (with bonus)"] == f"{expected.stats.mean_acceptance_length:.2f}"
    assert numbers["mean accepted draft tokens (without)"] == f"{expected.stats.mean_accepted_draft_tokens:.2f}"
    assert float(numbers["decode tokens/s"]) > 0
    assert [url for url in elsewhere if not url.startswith((page.url, "data:", "blob:"))] == []


def test_an_answer_is_seen_to_grow(page, talkative):
    page.evaluate(
        """() => {
          window.lengths = [];
          const look = () => {
            const answer = document.querySelector('.panel[data-state] .answer');
            const length = answer ? answer.innerText.length : 0;
            if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
          };
          new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.fill("#question textarea", "What is a chart for?")  # without a picture
    page.click("#ask")
    expect(page.locator("#stop")).to_be_enabled(timeout=SECONDS)
    expect(page.locator("#compare")).to_be_disabled()
    answered(page)
    lengths = page.evaluate("window.lengths")
    assert len(lengths) >= 3 and lengths == sorted(lengths)
    expect(page.locator("#stop")).to_be_disabled()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_and_autoregressive_side_by_side(page, temperature):
    page.locator("#examples button").nth(1).click()
    expect(page.locator("#picture img")).to_be_visible(timeout=60_000)
    expect(page.locator("#question textarea")).not_to_have_value("Describe the picture.")
    page.locator("button", has_text="Sampling").click()
    page.get_by_label("number input for Temperature").fill(str(temperature))
    page.locator("#seed input").fill("7")
    page.click("#compare")
    answered(page, 2)
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("Identical: both answers have the same")
    expect(verdict).to_contain_text("Speed-up")
    ours, theirs = page.locator(".answer").all_inner_texts()
    assert ours == theirs and len(ours) > 20
    speculative, autoregressive = page.locator(".panel").all()
    assert speculative.locator(".draft").count() > 0
    assert autoregressive.locator(".draft").count() == 0
    assert page.locator(".legend").is_visible()


def test_stop_ends_the_answer(page, talkative):
    page.click("#ask")
    expect(page.locator(".answer .own").first).to_be_visible(timeout=SECONDS)
    page.click("#stop")
    answered(page)
    expect(page.locator(".panel h3")).to_contain_text("stopped")
    until(lambda: talkative.stats().running == 0, "the request still runs")


def test_a_visitor_who_leaves_is_answered_no_further(browser, address, talkative):
    before = talkative.stats().finished.get("cancelled", 0)
    page = opened(browser, address)
    page.click("#ask")
    expect(page.locator(".answer .own").first).to_be_visible(timeout=SECONDS)
    page.close()
    until(lambda: talkative.stats().finished.get("cancelled", 0) == before + 1, "the request was not cancelled")
    assert talkative.stats().running == 0


def test_errors_are_one_sentence(page, tmp_path):
    page.fill("#question textarea", "   ")
    page.click("#ask")
    alert = page.locator('[role="alert"].sentence')
    expect(alert).to_have_text("The prompt is empty; give a text, or messages with some content.", timeout=60_000)
    expect(page.locator("#ask")).to_be_enabled()

    page.fill("#question textarea", "<b>What</b> is this?")
    broken = tmp_path / "broken.png"
    broken.write_bytes(demo.picture_path().read_bytes()[:400])
    page.set_input_files("#picture input[type=file]", broken)
    expect(page.locator("#picture img")).to_have_count(1, timeout=60_000)
    page.click("#ask")
    expect(alert).to_contain_text("The picture cannot be read:", timeout=60_000)
    assert str(tmp_path) not in alert.inner_text() and "gradio" not in alert.inner_text()


def test_a_narrow_window_shows_everything(browser, address):
    page = opened(browser, address)
    page.set_viewport_size({"width": 400, "height": 800})
    page.click("#compare")
    answered(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_the_page_stands_beside_the_routes_of_its_app(browser, engine):
    app = FastAPI()
    app.get("/v1/models")(lambda: {"object": "list"})
    with served(mount_page(app, engine, path="/page")) as address:
        assert httpx.get(f"{address}/v1/models").json() == {"object": "list"}
        assert httpx.get(f"{address}/gradio_api/info").status_code == 404
        assert httpx.get(f"{address}/page/gradio_api/info").status_code == 404
        page = opened(browser, f"{address}/page")
        upload(page, demo.picture_path())
        page.click("#ask")
        answered(page)
        page.close()


def test_with_a_key_nobody_comes_in_without_it(browser, engine):
    with served(mount_page(FastAPI(), engine, api_key=KEY)) as address:
        upload = httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"})
        asked = httpx.post(f"{address}/gradio_api/queue/join", json={"fn_index": 0, "data": [], "session_hash": "1"})
        config = httpx.get(f"{address}/config")
        assert [upload.status_code, asked.status_code, config.status_code] == [401, 401, 401]
        wrong = httpx.post(f"{address}/login", data={"username": "me", "password": "another"})
        assert wrong.status_code == 400

        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=text]").fill("me", timeout=60_000)
        page.locator("input[type=password]").fill(KEY)
        page.locator("button").click()
        expect(page.locator("#ask")).to_be_visible(timeout=60_000)
        page.click("#ask")
        answered(page)
        page.close()


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/secret.png", "/etc/passwd", "../../etc/passwd"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_request_cannot_name_a_file_or_a_url(address, path, place):
    """As another client than the page might send it, also where a text belongs."""
    functions = httpx.get(f"{address}/config").json()["dependencies"]
    ask = next(each["id"] for each in functions if each["api_name"] == "ask")
    data = [None, "What is this?", 0, 0, 8]
    data[place] = {"path": path, "meta": {"_type": "gradio.FileData"}}
    joined = httpx.post(
        f"{address}/gradio_api/queue/join", json={"fn_index": ask, "data": data, "session_hash": f"s{place}"}
    )
    assert joined.status_code == 200, joined.text
    told = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=s{place}", timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                told.append(json.loads(line[5:]))
                if told[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    assert told[-1]["msg"] == "process_completed" and told[-1]["success"] is False
    assert "root:" not in json.dumps(told)
    assert not list(Path(get_upload_folder()).glob("*/passwd"))


@pytest.mark.parametrize(
    "path",
    [
        *("file=/etc/passwd", "file=http://127.0.0.1:9/picture.png", f"file={Path(jaxspec.__file__)}", "file=x%00y"),
        *(f"file={get_upload_folder()}/../../etc/passwd", "proxy=http://127.0.0.1:9/", "info", "openapi.json"),
        *("vibe-code", "run-history/records", "../monitoring/summary"),
    ],
)
def test_no_other_path_of_gradio_is_open(address, path):
    assert httpx.get(httpx.URL(f"{address}/gradio_api/{path}")).status_code == 404


def test_nobody_is_told_of_visitors(address):
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False
    assert "googleapis" not in httpx.get(address).text
