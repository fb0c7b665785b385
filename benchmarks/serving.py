"""A server under load: so many streams at once, for so long; throughput, waiting times, and whether every answer is the
one that its request gets alone.

    python benchmarks/serving.py                        # 1, 4, 16, 64 streams, three modes, 60 s each
    python benchmarks/serving.py --peer                 # `transformers serve` with the same folder beside them
    python benchmarks/serving.py --requests 2000        # memory of the server over so many requests
    python benchmarks/serving.py --start                # from nothing to the first token; again with the cache on disk

Server and load are two processes. Questions are the embedded model's own, every second one sampled at temperature 1,
for `transformers serve` all greedy. A stream asks its next question when the last answer is complete.
"""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tyro

from jaxspec import Generator, SamplingParams, demo, load_target
from jaxspec.benchmark.host import StolenShare

ROOT = Path(__file__).parents[1]
MODES = {
    "speculative": {"method": "vispec", "adaptive": False},
    "autoregressive": {"method": "none"},
    "adaptive": {"method": "vispec"},
}
STARTING = 900.0


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of which server."""

    streams: tuple[int, ...] = (1, 4, 16, 64)
    """How many at once."""
    seconds: float = 60.0
    """For so long each."""
    modes: tuple[str, ...] = tuple(MODES)
    peer: bool = False
    """Also ask `transformers serve`, greedily."""
    requests: int = 0
    """Instead: so many requests over 16 streams to the adaptive server, and its memory meanwhile."""
    start: bool = False
    """Instead: how long the adaptive server takes from its start to a first token and until everything is compiled."""
    questions: int = 48
    """Different ones."""
    max_tokens: int = 200
    max_model_len: int = 512
    output: Path | None = None
    """Also write the numbers to this file."""


@dataclasses.dataclass
class Question:
    """A request and what it is answered alone."""

    body: dict[str, Any]
    text: str
    tokens: int


@dataclasses.dataclass
class Asked:
    """One answer as it came."""

    first: float  # seconds until the first token
    between: list[float]  # seconds between two pieces
    seconds: float
    tokens: int
    same: bool
    failed: str = ""


def questions(count: int, max_tokens: int, model: str, greedy: bool = False) -> list[Question]:
    """Requests about pictures of the embedded model's test set, with their answers."""
    target = load_target(demo.target_path())
    generator = Generator(target, max_length=512)
    made = []
    for number, example in enumerate(demo.examples("test", count, 0)):
        file = io.BytesIO()
        example.image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": example.question}]
        temperature = 0.0 if greedy else float(number % 2)
        body = {"messages": [{"role": "user", "content": content}], "temperature": temperature, "seed": number}
        body |= {"model": model, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        sampling = SamplingParams(temperature=temperature, seed=number)
        alone = generator.generate(example.question, [example.image], sampling, max_tokens)
        made.append(Question(body, alone.text, len(alone.tokens)))
    return made


async def ask(client: httpx.AsyncClient, question: Question) -> Asked:
    started = time.perf_counter()
    times, text, usage = [], "", {}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=question.body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode()[:200]
                return Asked(0, [], 0, 0, False, f"{response.status_code} {said}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Asked(0, [], 0, 0, False, str(chunk["error"]))
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    if piece := choice.get("delta", {}).get("content"):
                        times.append(time.perf_counter())
                        text += piece
    except httpx.HTTPError as error:
        return Asked(0, [], 0, 0, False, repr(error))
    ended = time.perf_counter()
    tokens = usage.get("completion_tokens", question.tokens)
    return Asked(
        (times or [ended])[0] - started, np.diff(times).tolist(), ended - started, tokens, text == question.text
    )


async def run_load(url: str, asked: list[Question], streams: int, seconds: float, most: int = 10**9) -> dict[str, Any]:
    """`streams` of requests for `seconds`, or until `most` were begun."""
    begun, answers = 0, []
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        until = time.perf_counter() + seconds

        async def stream() -> None:
            nonlocal begun
            while time.perf_counter() < until and begun < most:
                begun += 1
                answers.append(await ask(client, asked[(begun * 7) % len(asked)]))

        stolen, started = StolenShare(), time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        elapsed, share = time.perf_counter() - started, stolen()
    good = [each for each in answers if not each.failed]
    firsts, between = [each.first for each in good], [gap for each in good for gap in each.between]
    per_token = [sum(each.between) / max(each.tokens - 1, 1) for each in good]
    return {
        "streams": streams,
        "requests": len(answers),
        "failed": [each.failed for each in answers if each.failed][:5],
        "identical": sum(each.same for each in good),
        "tokens_per_second": sum(each.tokens for each in good) / elapsed,
        "first_token": quantiles(firsts),
        "between_pieces": quantiles(between),
        "per_token": quantiles(per_token),
        "stolen": share,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(values or [np.nan], q)) for name, q in (("p50", 0.5), ("p99", 0.99))}


@contextlib.contextmanager
def serving(command: list[str], ready: str, port: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process of its own, from when `ready` answers."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        until = time.perf_counter() + STARTING
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + ready, timeout=5.0).status_code == 200:
                    break
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ours(mode: str, load: Load, port: int) -> list[str]:
    command = [sys.executable, "serve.py", "--port", str(port), "--max-model-len", str(load.max_model_len)]
    command += ["--max-num-seqs", str(max(load.streams)), "--max-queued-requests", "1000"]
    return [*command, "--speculative-config", json.dumps(MODES[mode])]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def resident(pid: int) -> float:
    """MiB of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def shown(name: str, entry: dict[str, Any]) -> str:
    """A row of the table, in milliseconds."""
    cells = [name, entry["streams"], f"{entry['tokens_per_second']:.0f}"]
    for field in ("first_token", "per_token", "between_pieces"):
        cells += [f"{1e3 * entry[field]['p50']:.0f} / {1e3 * entry[field]['p99']:.0f}"]
    cells += [f"{entry['requests']}", f"{len(entry['failed'])}", f"{entry['identical']}"]
    return "| " + " | ".join(map(str, cells)) + " |"


HEADER = (
    "| server | streams | tokens/s | first token, ms (p50 / p99) | per token | between pieces | requests | failed "
    "| identical |\n|---|---|---|---|---|---|---|---|---|"
)


def memory_of(load: Load) -> dict[str, Any]:
    """The adaptive server over many requests."""
    asked, port = questions(load.questions, load.max_tokens, "demo"), free_port()
    with serving(ours("adaptive", load, port), "/ready", port) as (url, process):
        taken, tenth = [], max(1, load.requests // 10)
        for _ in range(10):
            entry = asyncio.run(run_load(url, asked, 16, 3600.0, tenth))
            taken.append({"requests": entry["requests"], "identical": entry["identical"], "mib": resident(process.pid)})
            print(taken[-1], flush=True)
    return {"memory": taken}


def starts_of(load: Load) -> dict[str, Any]:
    """The adaptive server, started twice with one folder for compiled programs; a client asks as soon as it listens."""
    asked, taken = questions(1, load.max_tokens, "demo"), []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nothing compiled", "compiled programs on disk"):
            port, started = free_port(), time.perf_counter()
            command = [*ours("adaptive", load, port), "--compilation-cache", folder]
            with serving(command, "/health", port) as (url, _):
                listening = time.perf_counter() - started
                first = listening + asyncio.run(run_load(url, asked, 1, 600.0, 1))["first_token"]["p50"]
                while httpx.get(url + "/ready").status_code != 200:
                    time.sleep(0.2)
                ready = time.perf_counter() - started
                metrics = httpx.get(url + "/metrics").text
            programs = next(line for line in metrics.splitlines() if line.startswith("jaxspec_compilations_total "))
            entry = {"start": name, "listening": listening, "first_token": first, "ready": ready}
            taken.append(entry | {"programs": float(programs.split()[1])})
            print(taken[-1], flush=True)
    return {"starts": taken}


def main(load: Load) -> None:
    if load.requests:
        results = memory_of(load)
    elif load.start:
        results = starts_of(load)
    else:
        results = {"load": []}
        print(HEADER)
        asked = questions(load.questions, load.max_tokens, "demo")
        for mode in load.modes:
            port = free_port()
            with serving(ours(mode, load, port), "/ready", port) as (url, _):
                asyncio.run(run_load(url, asked, 1, 3.0))
                for streams in load.streams:
                    entry = asyncio.run(run_load(url, asked, streams, load.seconds))
                    results["load"].append({"server": mode, **entry})
                    print(shown(mode, entry), flush=True)
        if load.peer:
            folder, port = demo.target_path(), free_port()
            asked = questions(load.questions, load.max_tokens, str(folder), greedy=True)
            command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port)]
            with serving([*command, "--device", "cpu", "--dtype", "float32"], "/health", port) as (url, _):
                asyncio.run(run_load(url, asked, 1, 3.0))
                for streams in load.streams:
                    entry = asyncio.run(run_load(url, asked, streams, load.seconds))
                    results["load"].append({"server": "transformers serve", **entry})
                    print(shown("transformers serve", entry), flush=True)
    if load.output is not None:
        load.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Load, description=__doc__))
