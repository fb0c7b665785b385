"""Two replicas of Ray Serve on this machine, as deploy/ray_serve.py starts them: who answers what, what is lost with
one of them, and how they end."""

import concurrent.futures
import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from starlette.datastructures import Headers

import jaxspec
from jaxspec import Generator, SamplingParams
from jaxspec.cli.options import ModelOptions
from jaxspec.serving.replicas.sessions import session_of
from tests.serving.asking import ONE, TEXT, TURNS, user
from tests.serving.listening import eventually

if not (find_spec("ray") or os.environ.get("CI")):
    pytest.skip("ray is not installed", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families

from deploy.ray_serve import RayServe, app, flags
from jaxspec.serving.replicas.front import Merged

ROOT = Path(__file__).parents[2]
START_SECONDS = 170
LENGTH = 1024
SLOTS = 2
ONGOING = 3
WAITING = 12
LONG = 400
"""Tokens of an answer that is still on its way when something happens."""
NAME, SESSION = "x-jaxspec-replica", "x-session-id"


class Answer(NamedTuple):
    status: int
    text: str
    error: dict | None
    replica: str | None
    body: dict | None = None


class Client:
    """Asks the replicas."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.Client(base_url=url, timeout=240, limits=limits)

    def ask(self, messages: list, tokens: int = 1, stream: bool = False, session: str = "", **options) -> Answer:
        """Greedily, where nothing else is said; a session stands in the header."""
        headers = {SESSION: session} if session else {}
        asked = {"model": "demo", "temperature": 0, "max_tokens": tokens, "messages": messages, "stream": stream}
        response = self.http.post("/v1/chat/completions", json=asked | options, headers=headers)
        replica = response.headers.get(NAME)
        if response.headers["content-type"].startswith("application/json"):
            body = response.json()
            if "error" in body:
                return Answer(response.status_code, "", body["error"], replica)
            return Answer(response.status_code, body["choices"][0]["message"]["content"], None, replica, body)
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        done = events[-1] == "[DONE]"
        said = [json.loads(each) for each in events[: -1 if done else None]]
        error = next((each["error"] for each in said if "error" in each), None)
        assert done == (error is None), "a stream ends with [DONE], or with an error"
        text = "".join(choice["delta"].get("content") or "" for each in said for choice in each.get("choices", []))
        return Answer(response.status_code, text, error, replica)

    def running(self) -> int:
        return self.http.get("/health").json()["running"]

    def replicas(self) -> set[str]:
        """The names of those that live, as the metrics tell."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        slots = next(family for family in families if family.name == "jaxspec_num_slots")
        return {sample.labels["replica"] for sample in slots.samples}


class Served(NamedTuple):
    client: Client
    process: subprocess.Popen
    lines: list[str]


def ray_processes() -> set[int]:
    """The numbers of all processes that are Ray's."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = file.read_bytes()
            if b"ray::" in said or b"/ray/" in said:
                found.add(int(file.parent.name))
    return found


def process_of(replica: str) -> int:
    """The number of a replica's process, which writes to a log of its name."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink().name == f"replica_jaxspec_Replica_{replica}.log":
                return int(link.parts[2])
    raise AssertionError(f"there is no replica {replica}")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Two replicas of deploy/ray_serve.py, with the settings above. Afterwards nothing of Ray is left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "port": port,
        "replicas": 2,
        "num_cpus": 0.5,
        "max_num_seqs": SLOTS,
        "max_ongoing_requests": ONGOING,
        "max_queued_requests": WAITING,
        "max_model_len": LENGTH,
        "shutdown_timeout": 100,
        "health_check_period": 1,
        "speculative_config": {"method": "vispec", "adaptive": False},
    }
    environment = {name: value for name, value in os.environ.items() if name != "JAXSPEC_API_KEY"}
    # A token of its own, which Ray need not write to the home folder.
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    before = ray_processes()
    process = subprocess.Popen(
        [sys.executable, "deploy/ray_serve.py", *flags(options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    ready: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("ready: "):
                ready.put(line.split()[1])
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        url = ready.get(timeout=START_SECONDS)
        assert url == f"http://127.0.0.1:{port}/v1", lines
        yield Served(Client(url.removesuffix("/v1")), process, lines)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
        assert eventually(lambda: not ray_processes() - before, 30)


@pytest.fixture(scope="module")
def client(served) -> Client:
    return served.client


@pytest.fixture(scope="module")
def generator() -> Generator:
    target = jaxspec.load_target("demo")
    return Generator(target, jaxspec.load_drafter("demo:vispec", target), max_length=LENGTH)


@pytest.fixture(scope="module")
def long_answer(generator) -> str:
    """Of `LONG` tokens."""
    return generator.generate(TEXT, sampling=SamplingParams(min_tokens=LONG), max_new_tokens=LONG).text


def ask_long(client: Client, number: int, session: str = "") -> Answer:
    """That answer, every second one as a stream."""
    return client.ask(TEXT, LONG, bool(number % 2), session, min_tokens=LONG)


def session_on(client: Client, replica: str, number: int) -> str:
    """A session that this replica answers; there is one among a few."""
    for each in range(100):
        if client.ask(TEXT, session=f"{number}/{each}").replica == replica:
            return f"{number}/{each}"
    raise AssertionError(f"no session is answered by {replica}")


# -- without any replica ---------------------------------------------------------------------------------------------


def session(body: dict | bytes, **headers: str) -> str:
    return session_of(Headers(headers), body if isinstance(body, bytes) else json.dumps(body).encode())


def test_a_conversation_is_named_by_the_header_the_user_or_its_first_messages():
    first, other = [{"role": "system", "content": "Be brief."}, *ONE], [{"role": "system", "content": "Rhyme."}, *ONE]
    later = [*first, {"role": "assistant", "content": "It is."}, user("And then?", 1)]
    assert session({"messages": first}) == session({"messages": later, "max_tokens": 3}) != ""
    assert session({"messages": first}) != session({"messages": other})
    assert session({"messages": ONE}) != session({"messages": TEXT})
    assert session({"messages": ONE, "user": "a"}) == session({"messages": TEXT, "user": "a"})
    assert session({"messages": ONE, "user": "a"}) != session({"messages": ONE, "user": "b"})
    named = session({"messages": ONE, "user": "a"}, **{SESSION: "s"})
    assert named == session({"messages": TEXT}, **{SESSION: "s"}) != session({"user": "s"})
    assert "secret" not in session({"user": "secret"}) + session({}, **{SESSION: "secret"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"messages": [1, {"role": 2}]}', b'{"user": "", "messages": 3}']
)
def test_what_is_no_conversation_has_no_name(body):
    assert session(body) == ""


def test_options_of_a_configuration_file_are_those_of_the_command_line():
    options = {"max_num_seqs": 3, "generation_config": False, "allowed-media-domains": ["a.example", "b.example"]}
    assert flags(options | {"resources": {"TPU": 4}, "max_replicas": None}) == [
        *("--max-num-seqs", "3", "--no-generation-config", "--allowed-media-domains", "a.example"),
        *("--allowed-media-domains", "b.example", "--resources", '{"TPU": 4}'),
    ]


def test_serve_run_has_the_same_options():
    assert (
        app({"replicas": "2", "model": "demo", "speculative_config": {"method": "vispec"}})._bound_deployment.name
        == "Front"
    )
    with pytest.raises(SystemExit):
        app({"no_such_option": 1})


def test_what_a_replica_gets():
    assert RayServe().actor_options()["runtime_env"]["env_vars"]["JAX_PLATFORMS"] == "cpu"
    given = RayServe(num_gpus=2, replica_env='{"XLA_FLAGS": "--x"}').actor_options()
    assert given["num_gpus"] == 2 and "JAX_PLATFORMS" not in given["runtime_env"]["env_vars"]
    assert given["runtime_env"]["env_vars"]["XLA_FLAGS"] == "--x"
    assert RayServe(resources='{"TPU": 4}').actor_options()["resources"] == {"TPU": 4}
    assert RayServe(max_num_seqs=8).ongoing == 10 and RayServe(max_ongoing_requests=4).ongoing == 4
    assert RayServe(replicas=3).number() == {"num_replicas": 3}
    scaling = RayServe(replicas=2, max_replicas=5, max_num_seqs=8).number()["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 5, 6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be at least 3, got 2"),
        ({"resources": "TPU"}, 'resources must be JSON such as {"TPU": 4}, got'),
        ({"replica_env": '{"A": 1}'}, 'replica_env must be JSON such as {"NAME": "value"}, got'),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(options, sentence):
    with pytest.raises(ValueError, match=".*") as refused:
        RayServe(**options).application()
    assert sentence in str(refused.value)


def test_metrics_of_replicas_stand_side_by_side():
    one = '# HELP jaxspec_x_total X.\n# TYPE jaxspec_x_total counter\njaxspec_x_total{cache="images"} 1.0\n'
    (family,) = Merged({"a": one, "b": one.replace("1.0", "2.0")}).collect()
    values = {(sample.labels["replica"], sample.labels["cache"]): sample.value for sample in family.samples}
    assert values == {("a", "images"): 1.0, ("b", "images"): 2.0}


def test_a_replica_of_two_devices_answers_the_same():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "tests/serving/sharded_answers.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert min(report["split"]) > 0 and report["answers"] == report["expected"]


def test_a_replica_needs_its_devices():
    with pytest.raises(ValueError, match="tensor is 64, but there is 1 device$"):
        RayServe(ModelOptions(tensor=64)).load_engine()


# -- two replicas ----------------------------------------------------------------------------------------------------


def test_answers_equal_the_generators(client, generator):
    assert client.http.get("/ready").json() == {"status": "ready"}
    for messages in (TEXT, ONE, TURNS):
        greedy = generator.generate(messages, max_new_tokens=24)
        sampled = generator.generate(messages, sampling=SamplingParams(temperature=1.0, seed=5), max_new_tokens=24)
        for stream in (False, True):
            assert client.ask(messages, 24, stream).text == greedy.text
            assert client.ask(messages, 24, stream, temperature=1.0, seed=5).text == sampled.text


def test_requests_are_spread_and_metrics_name_the_replicas(client):
    answered = {client.ask(TEXT, session=f"conversation {number}").replica for number in range(24)}
    assert len(answered) == 2 and None not in answered
    assert client.replicas() == answered
    assert client.http.get("/health").json()["slots"] == 2 * SLOTS


def test_a_conversation_stays_where_it_was_read(client):
    for number in range(4):
        messages, answered, cached = [user(f"What is in picture {number}?", number)], set(), []
        for _ in range(3):
            answer = client.ask(messages, 8)
            answered.add(answer.replica)
            cached.append(answer.body["usage"]["prompt_tokens_details"]["cached_tokens"])
            messages = [*messages, {"role": "assistant", "content": answer.text}, user("What else?")]
        assert len(answered) == 1
        assert 0 < cached[1] < cached[2]
    named = {client.ask(messages, user="somebody").replica for messages in (TEXT, ONE, TURNS)}
    assert len(named) == 1


def test_refusals_are_those_of_the_app(client):
    wrong = client.http.post("/v1/chat/completions", json={"model": "demo", "messages": [], "nonsense": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
    assert client.ask(TEXT, nonsense=1).error["message"] == "nonsense is no parameter that this server knows"
    assert client.http.get("/nowhere").status_code == 404
    assert client.http.get("/v1/models").json()["data"][0]["max_model_len"] == LENGTH


def test_more_than_may_wait_are_refused(client):
    asked = 2 * ONGOING + WAITING + 24  # so many that none of the last can come when the first are answered already
    with concurrent.futures.ThreadPoolExecutor(asked) as pool:
        answers = [pool.submit(client.ask, TEXT, 150, session=f"{number}", min_tokens=150) for number in range(asked)]
        ended = [answer.result() for answer in answers]
    assert {answer.status for answer in ended} == {200, 429}
    assert all(answer.error["code"] == "queue_full" for answer in ended if answer.status == 429)
    assert sum(answer.status == 200 for answer in ended) >= WAITING


def test_a_client_that_leaves_frees_its_slot(client):
    asked = {"model": "demo", "messages": TEXT, "max_tokens": LONG, "min_tokens": LONG, "stream": True}
    for _ in range(2 * SLOTS):
        with client.http.stream("POST", "/v1/chat/completions", json=asked, headers={SESSION: "left"}) as stream:
            next(stream.iter_lines())
    assert eventually(lambda: client.running() == 0, 20)


def test_a_replica_that_dies_takes_only_its_own_requests_with_it(client, long_answer):
    victim = client.ask(TEXT).replica
    asked, sessions = 2 * ONGOING + 4, [session_on(client, victim, number) for number in range(2)]
    process = process_of(victim)
    with concurrent.futures.ThreadPoolExecutor(asked) as pool:
        answers = [pool.submit(ask_long, client, number, sessions[number % 2]) for number in range(asked)]
        assert eventually(lambda: client.running() >= 2 * SLOTS, 60)
        os.kill(process, signal.SIGKILL)
        ended = [answer.result() for answer in answers]
    lost = [answer for answer in ended if answer.error is not None]
    assert 1 <= len(lost) <= ONGOING
    for answer in lost:
        assert answer.error["code"] == "replica_lost" and answer.error["type"] == "server_error"
        assert answer.error["message"].startswith("the replica that worked on this request was lost")
        # A stream has begun with 200 and says it in its last event; whoever has nothing yet has the status.
        assert (answer.status, answer.replica) in {(200, victim), (503, None)}
        assert long_answer.startswith(answer.text)
    kept = [answer for answer in ended if answer.error is None]
    assert all((answer.status, answer.text) == (200, long_answer) for answer in kept)
    others = {answer.replica for answer in kept} - {victim}
    later = [client.ask(TEXT, session=each) for each in sessions]
    assert {answer.status for answer in later} == {200} and victim not in {answer.replica for answer in later}
    assert others
    assert eventually(lambda: len(client.replicas() - {victim}) == 2, 90), "Ray puts another in its place"
    answered = {client.ask(TEXT, session=f"conversation {number}").replica for number in range(24)}
    assert len(answered) == 2 and victim not in answered


def test_sigterm_under_load_loses_no_accepted_request(served, long_answer):
    client, process, lines = served
    sessions = [session_on(client, replica, 0) for replica in sorted(client.replicas())]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask_long, client, number, sessions[number // 4]) for number in range(8)]
        assert eventually(lambda: client.running() >= 2 * SLOTS, 60)
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: client.http.get("/ready").status_code == 503, 20)
        refused = client.ask(TEXT)
        assert (refused.status, refused.error["code"]) == (503, "stopping")
        ended = [answer.result() for answer in answers]
    assert [(answer.status, answer.text) for answer in ended] == 8 * [(200, long_answer)]
    assert process.wait(60) == 0
    assert eventually(lambda: lines[-1] == "stopped", 5)
    assert any(line.startswith("stopping when") for line in lines)
