"""A server under load: so many streams at once, for so long; throughput, waiting times, and whether every answer is the
one that its request gets alone.

    python benchmarks/serving.py                        # 1, 4, 16, 64 streams, three modes, 60 s each
    python benchmarks/serving.py --peer                 # `transformers serve` with the same folder (needs accelerate)
    python benchmarks/serving.py --requests 2000        # memory of the server over so many requests
    python benchmarks/serving.py --start                # from nothing to the first token; again with the cache on disk

Servers and load are processes of their own. All servers stand from the beginning and are asked in turns, so that times
in which the machine is slow are slow for all. Questions are the embedded model's own, every second one sampled at
temperature 1, for `transformers serve` all greedy; its answers begin with a blank, which is not compared. A stream asks
its next question when the last answer is complete. Tokens count that came before a turn was over.
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
    """For so long each, in all turns together."""
    turns: int = 3
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

    started: float
    times: list[float]  # of its pieces
    tokens: int
    same: bool
    failed: str = ""

    @property
    def between(self) -> list[float]:
        """Seconds between two pieces."""
        return np.diff(self.times).tolist()

    def tokens_until(self, time_: float) -> float:
        return self.tokens * float(np.mean([each <= time_ for each in self.times or [np.inf]]))


@dataclasses.dataclass
class Turn:
    """What so many streams were answered for a while."""

    answers: list[Asked]
    until: float
    seconds: float
    stolen: float


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
                return Asked(started, [], 0, False, f"{response.status_code} {said}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Asked(started, [], 0, False, str(chunk["error"]))
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    if piece := choice.get("delta", {}).get("content"):
                        times.append(time.perf_counter())
                        text += piece
    except httpx.HTTPError as error:
        return Asked(started, [], 0, False, repr(error))
    tokens = usage.get("completion_tokens", question.tokens)
    return Asked(started, times, tokens, text.lstrip() == question.text.lstrip())


async def run_load(url: str, asked: list[Question], streams: int, seconds: float, most: int = 10**9) -> Turn:
    """`streams` of requests for `seconds`, or until `most` were begun."""
    begun, answers = 0, []
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        stolen, started = StolenShare(), time.perf_counter()
        until = started + seconds

        async def stream() -> None:
            nonlocal begun
            while time.perf_counter() < until and begun < most:
                begun += 1
                answers.append(await ask(client, asked[(begun * 7) % len(asked)]))

        await asyncio.gather(*(stream() for _ in range(streams)))
    return Turn(answers, until, seconds, stolen())


def summary(streams: int, turns: list[Turn]) -> dict[str, Any]:
    """Seconds, tokens a second and counts of all turns of a server."""
    answers = [each for turn in turns for each in turn.answers]
    good = [each for each in answers if not each.failed and each.times]
    tokens = [each.tokens_until(turn.until) for turn in turns for each in turn.answers]
    failed = [each.failed or "no text" for each in answers if each.failed or not each.times]
    return {
        "streams": streams,
        "requests": len(answers),
        "failed": len(failed),
        "failures": failed[:5],
        "identical": sum(each.same for each in good),
        "tokens_per_second": sum(tokens) / sum(turn.seconds for turn in turns),
        "first_token": quantiles([each.times[0] - each.started for each in good]),
        "between_pieces": quantiles([gap for each in good for gap in each.between]),
        "per_token": quantiles([sum(each.between) / max(each.tokens - 1, 1) for each in good]),
        "stolen": max(turn.stolen for turn in turns),
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
    cells += [f"{entry['requests']}", f"{entry['failed']}", f"{entry['identical']}"]
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
            entry = summary(16, [asyncio.run(run_load(url, asked, 16, 3600.0, tenth))])
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
                (answer,) = asyncio.run(run_load(url, asked, 1, 600.0, 1)).answers
                first = answer.times[0] - started
                while httpx.get(url + "/ready").status_code != 200:
                    time.sleep(0.2)
                ready = time.perf_counter() - started
                metrics = httpx.get(url + "/metrics").text
            programs = next(line for line in metrics.splitlines() if line.startswith("jaxspec_compilations_total "))
            entry = {"start": name, "listening": listening, "first_token": first, "ready": ready}
            taken.append(entry | {"programs": float(programs.split()[1])})
            print(taken[-1], flush=True)
    return {"starts": taken}


def peer(port: int) -> list[str]:
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port)]
    return [*command, "--device", "cpu", "--dtype", "float32", "--model-timeout", "100000", "--log-level", "error"]


def loads_of(load: Load) -> dict[str, Any]:
    """All servers, in turns."""
    asked = {"ours": questions(load.questions, load.max_tokens, "demo")}
    if load.peer:
        asked["peer"] = questions(load.questions, load.max_tokens, str(demo.target_path()), greedy=True)
    servers, taken = {}, []
    with contextlib.ExitStack() as stack:
        for name in (*load.modes, *(["transformers serve"] if load.peer else ())):
            port, theirs = free_port(), name not in MODES
            command, ready = (peer(port), "/health") if theirs else (ours(name, load, port), "/ready")
            url, _ = stack.enter_context(serving(command, ready, port))
            servers[name] = url, asked["peer" if theirs else "ours"]
            asyncio.run(run_load(*servers[name], 1, 3.0))
        print(HEADER)
        for streams in load.streams:
            turns = {name: [] for name in servers}
            for turn in range(load.turns):
                names = list(servers)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    turns[name].append(asyncio.run(run_load(*servers[name], streams, load.seconds / load.turns)))
            for name, each in turns.items():
                taken.append({"server": name, **summary(streams, each)})
                print(shown(name, taken[-1]), flush=True)
    return {"load": taken}


def main(load: Load) -> None:
    results = memory_of(load) if load.requests else starts_of(load) if load.start else loads_of(load)
    if load.output is not None:
        load.output.parent.mkdir(parents=True, exist_ok=True)
        load.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Load, description=__doc__))
