"""`serve.py` as a process: what it says when it is ready, and how it ends on SIGTERM and Ctrl-C, under load."""

import concurrent.futures
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.listening import eventually

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
SECRET = "sk-only-in-the-environment"


class Process:
    """A running serve.py, and the lines that it has printed."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "serve.py", "--port", "0", "--max-model-len", "512", *arguments]
        environment = os.environ | {"JAXSPEC_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.ready: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("ready: "):
                self.ready.put(line.split()[1])
        self.ready.put(None)

    @property
    def url(self) -> str:
        """Waits until it serves."""
        url = self.ready.get(timeout=START_SECONDS)
        assert url is not None, self.lines
        return url

    def ended(self, seconds: float) -> int:
        """Its exit status; it must be over within so long."""
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[Process, httpx.Client]]:
    process = Process(*arguments)
    try:
        headers = {"Authorization": f"Bearer {SECRET}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        with httpx.Client(base_url=process.url, headers=headers, timeout=120, limits=limits) as client:
            yield process, client
    finally:
        process.process.kill()
        process.ended(10)


def ask(client: httpx.Client, tokens: int, stream: bool = False) -> tuple[int, str, dict | None]:
    """(status, text, error) of a greedy answer of so many tokens."""
    message = {"role": "user", "content": "What is a chart for?"}
    asked = {"model": "demo", "messages": [message], "temperature": 0, "max_tokens": tokens, "min_tokens": tokens}
    response = client.post("/chat/completions", json=asked | {"stream": stream})
    if response.headers["content-type"].startswith("application/json"):
        said = response.json()
        return response.status_code, *(
            (said["choices"][0]["message"]["content"], None) if "choices" in said else ("", said["error"])
        )
    text, error, done = "", None, False
    for line in filter(None, response.text.splitlines()):
        if line == "data: [DONE]":
            done = True
            continue
        said = json.loads(line.removeprefix("data: "))
        error = said.get("error", error)
        text += "".join(choice["delta"].get("content") or "" for choice in said.get("choices", []))
    assert done != (error is not None)
    return response.status_code, text, error


def running(client: httpx.Client) -> int:
    said = client.get("../health").json()
    return said["running"] + said["waiting"]


def test_sigterm_under_load_loses_no_accepted_request():
    with serving("--max-num-seqs", "2", "--shutdown-timeout", "100") as (process, client):
        shown = "\n".join(process.lines)
        for said in ("vispec, tree 6/2/8", "2 at once, 256 may wait", "512 tokens", "data: URLs", "needed"):
            assert said in shown
        assert SECRET not in shown
        assert client.get("../ready").status_code == 200
        _, expected, _ = ask(client, 60)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, client, 60, stream=bool(number % 2)) for number in range(8)]
            assert eventually(lambda: running(client) == 8, 20)
            process.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: client.get("../ready").status_code == 503, 5)
            refused = client.post("/chat/completions", json={})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            assert int(refused.headers["retry-after"]) > 0
            assert client.get("../health").status_code == 200
            assert not all(answer.done() for answer in answers)
            assert [answer.result() for answer in answers] == 8 * [(200, expected, None)]
        assert process.ended(20) == 0
        assert "stopping when" in process.lines[-2] and process.lines[-1] == "stopped"
        with pytest.raises(httpx.ConnectError):
            client.get("../health")


def test_after_the_shutdown_timeout_the_rest_is_told_so():
    with serving("--max-num-seqs", "1", "--shutdown-timeout", "0.2") as (process, client):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, client, 450, stream=bool(number % 2)) for number in range(8)]
            assert eventually(lambda: running(client) == 8, 20)
            process.process.send_signal(signal.SIGTERM)
            ended = [answer.result() for answer in answers]
        told = [error for _, _, error in ended if error is not None]
        assert len(told) >= 6
        assert {error["code"] for error in told} == {"stopping"}
        assert all(error["message"] == "the server is stopping and has ended this answer" for error in told)
        assert all(status in (200, 503) for status, _, _ in ended)
        assert process.ended(20) == 0


def test_a_second_signal_ends_it_at_once():
    with serving("--max-num-seqs", "1") as (process, client), concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, client, 450) for _ in range(4)]
        assert eventually(lambda: running(client) == 4, 20)
        process.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: client.get("../ready").status_code == 503, 5)
        started = time.monotonic()
        process.process.send_signal(signal.SIGINT)
        assert process.ended(10) == 128 + signal.SIGINT and time.monotonic() - started < 2
        assert sum(answer.exception() is not None for answer in answers) >= 3


def test_ctrl_c_without_requests_ends_at_once():
    with serving() as (process, _):
        process.process.send_signal(signal.SIGINT)
        assert process.ended(20) == 0 and process.lines[-1] == "stopped"
