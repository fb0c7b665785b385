"""A headless Chromium, and an app served to it."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, sync_playwright

NAMES = "chromium", "chromium-browser", "google-chrome"


def chromium() -> str:
    """The machine's own. Where there is none a test fails in CI, which installs one, and is skipped elsewhere."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    problem = f"no browser on PATH: none of {', '.join(NAMES)}"
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(f"{problem}; on Debian: apt-get install chromium")


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of the app, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < give_up, "the server has not started"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive(), "the server has not stopped"
