"""Many engines behind one address: replicas of Ray Serve, on one machine or on a cluster.

    python deploy/ray_serve.py --replicas 2                                    # the embedded model, on this machine
    python deploy/ray_serve.py --address auto --host 0.0.0.0 --replicas 4 --num-gpus 2 --tensor 2 \
        --model llava-hf/llava-1.5-7b-hf --dtype bfloat16
    serve run deploy.ray_serve:app model=llava-hf/llava-1.5-7b-hf dtype=bfloat16 num_gpus=1 replicas=4

Every replica is the engine that serve.py serves, with the same HTTP interface; requests of one conversation meet the
same replica, which has read most of it before. docs/SERVING_RAY.md says the rest, deploy/rayservice.yaml is the same
for Kubernetes.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

try:
    import ray
except ModuleNotFoundError:
    raise SystemExit("jaxspec: ray is missing: pip install 'jaxspec-vlm[ray]'") from None
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from rich.console import Console

from jaxspec.checks import shown, whole_number
from jaxspec.cli.output import make_console
from jaxspec.cli.serve import Serve, say
from jaxspec.serving.http.limits import SPARE
from jaxspec.serving.http.server import LAST_WORDS_SECONDS
from jaxspec.serving.replicas.front import Front
from jaxspec.serving.replicas.replica import Replica

LOCAL = "local"
NAME = "jaxspec"
"""Of the application in Ray Serve."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
RAY_CACHE = "JAX_COMPILATION_CACHE_DIR"
LOGS = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclasses.dataclass(frozen=True)
class RayServe(Serve):
    """Answer OpenAI's chat completions with many replicas of an engine, which Ray Serve starts, watches and replaces.

    What serve.py can be told is true of each replica here; below are the options of their number and place. Without
    --address a Ray of this machine is started for as long as the command runs.

    SIGTERM and Ctrl-C end it without losing an accepted request; a second one ends it at once.
    """

    address: str = LOCAL
    """Of the Ray cluster: auto is the one that this machine belongs to, local starts one here."""
    replicas: int = 1
    """Replicas; with --max-replicas the least of them."""
    max_replicas: int | None = None
    """Most replicas; between the two numbers Ray Serve takes as many as --target-ongoing-requests asks for."""
    target_ongoing_requests: float | None = None
    """Requests that each replica shall have when their number adapts; by default three quarters of its slots."""
    upscale_delay: float = 30.0
    """Seconds of higher load before there are more replicas."""
    downscale_delay: float = 600.0
    """Seconds of lower load before there are fewer."""
    max_ongoing_requests: int | None = None
    """Requests that a replica has at a time; the others of its conversations go to the next one, and where all have so
    many they wait in front of them (--max-queued-requests). By default its slots and a quarter more, whose prompts are
    read meanwhile."""
    fronts: int = 1
    """Processes that requests pass on their way to a replica; one suffices for some hundred streams."""
    num_cpus: float = 1.0
    """CPU cores that Ray sets aside for a replica."""
    num_gpus: float = 0.0
    """GPUs of a replica."""
    resources: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """Whatever else Ray sets aside for a replica, as {"TPU": 4}."""
    replica_env: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """Environment variables of the replicas, as {"XLA_FLAGS": "..."}. Without GPUs and TPUs JAX_PLATFORMS is cpu."""
    health_check_period: float = 10.0
    """Seconds between two looks at a replica; one that does not answer well is replaced."""

    def run(self, console: Console, arguments: list[str]) -> None:
        del arguments
        self.check()
        whole_number("port", self.port, 1, 65535)
        application = self.application()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray ends its HTTP proxy when that is not up after 5 seconds, which it is not on a machine that compiles; its
        # `serve.start` waits for 60.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "50")
        started = {"include_dashboard": False} if self.address == LOCAL else {}
        ray.init(address=self.address, log_to_driver=False, **started)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's would leave its application behind
        try:
            self.warn_without_key(console, self.http_settings())
            say(console, "starting replicas ..")
            serve.start(http_options={"host": self.host, "port": self.port}, logging_config=LOGS)
            try:
                self.until_stopped(console, application)
            finally:
                # A cluster of others may have other applications.
                serve.shutdown() if self.address == LOCAL else serve.delete(NAME)
        finally:
            ray.shutdown()
        say(console, "stopped")

    def until_stopped(self, console: Console, application: serve.Application) -> None:
        """Until a signal has come and everybody who was inside has an answer. Raises ValueError where no replica comes
        to life."""
        try:
            serve.run(application, name=NAME, route_prefix="/", logging_config=LOGS)
        except RuntimeError as error:
            raise ValueError(f"the replicas did not start: {reason() or error}") from None
        signalled = Signalled()
        say(console, f"ready: http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/v1")
        signalled.wait()
        self.drain(console, serve.get_app_handle(NAME))

    def drain(self, console: Console, fronts: DeploymentHandle) -> None:
        """Lets nobody in any more; those that are inside have their answers, or are told that it took too long."""
        until, told, over = time.monotonic() + self.shutdown_timeout, False, False
        while inside := sum(fronts.broadcast("close").results(timeout_s=10)):
            if not told:
                say(console, f"stopping when {inside} accepted requests are answered; a second signal stops at once")
                told = True
            if time.monotonic() >= until:
                if over:
                    return
                fronts.broadcast("stop").results(timeout_s=10)
                until, over = time.monotonic() + LAST_WORDS_SECONDS, True
            time.sleep(0.1)

    def check(self) -> None:
        super().check()
        for name in ("replicas", "fronts"):
            whole_number(name, getattr(self, name), 1)
        if self.max_replicas is not None:
            whole_number("max_replicas", self.max_replicas, self.replicas)
        if self.max_ongoing_requests is not None:
            whole_number("max_ongoing_requests", self.max_ongoing_requests, 1)
        self.json_object("resources", int | float)
        self.json_object("replica_env", str)

    def json_object(self, name: str, kind: Any) -> dict[str, Any]:
        """The value of an option. Raises ValueError."""
        text = getattr(self, name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(each, kind) for each in value.values()):
            example = '{"NAME": "value"}' if kind is str else '{"TPU": 4}'
            raise ValueError(f"{name} must be JSON such as {example}, got {shown(text)}")
        return value

    @property
    def ongoing(self) -> int:
        """Most requests that a replica has at a time."""
        return self.max_ongoing_requests or self.max_num_seqs + math.ceil(self.max_num_seqs / 4)

    def application(self) -> serve.Application:
        """What `serve.run` takes. Raises ValueError."""
        self.check()
        settings, most = self.http_settings(), self.max_replicas or self.replicas
        replica = serve.deployment(Replica).options(
            name="Replica",
            ray_actor_options=self.actor_options(),
            max_ongoing_requests=self.ongoing,
            max_queued_requests=self.max_queued_requests,
            graceful_shutdown_timeout_s=self.shutdown_timeout + 10,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=self.health_check_period,
            health_check_timeout_s=30.0,
            max_constructor_retry_count=3,
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": max(1, most - 1)}
            ),
            **self.number(),
        )
        inside = most * self.ongoing + self.max_queued_requests + SPARE
        front = serve.deployment(serve.ingress()(Front)).options(
            name="Front",
            num_replicas=self.fronts,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}},
            max_ongoing_requests=inside + SPARE,  # so that it is the front that refuses, in OpenAI's words
            graceful_shutdown_timeout_s=self.shutdown_timeout + 10,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=self.health_check_period,
        )
        return front.bind(replica.bind(self.load_engine, settings), settings, inside)

    def number(self) -> dict[str, Any]:
        """How many replicas there are."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        target = self.target_ongoing_requests or 0.75 * self.max_num_seqs
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": target,
            "upscale_delay_s": self.upscale_delay,
            "downscale_delay_s": self.downscale_delay,
        }
        return {"autoscaling_config": scaling}

    def actor_options(self) -> dict[str, Any]:
        """What Ray gives a replica."""
        resources, variables = self.json_object("resources", int | float), self.json_object("replica_env", str)
        if not self.num_gpus and not any(name.startswith("TPU") for name in resources):
            variables = {"JAX_PLATFORMS": "cpu"} | variables
        if RAY_CACHE in os.environ:
            variables = {RAY_CACHE: os.environ[RAY_CACHE]} | variables
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": resources}
        return options | ({"runtime_env": {"env_vars": variables}} if variables else {})


def reason() -> str:
    """What the last replica that could not be made said of it."""
    application = serve.status().applications.get(NAME)
    if application is None:
        return ""
    messages = [deployment.message.strip() for deployment in application.deployments.values()]
    return next((message.splitlines()[-1] for message in messages if message), "")


class Signalled(threading.Event):
    """Set by the first SIGTERM or SIGINT; the second ends the process."""

    def __init__(self) -> None:
        super().__init__()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: Any) -> None:
        del frame
        if self.is_set():
            os._exit(128 + number)
        self.set()


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """For `serve run` and the configuration files of Ray Serve: arguments are the options, with their names in Python
    or on the command line. Address and port are Ray Serve's own business there."""
    return tyro.cli(RayServe, args=flags(arguments)).application()


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them."""
    made: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            made += [part for each in value for part in (f"--{flag}", str(each))]
        elif value is not None:
            made += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return made


def main() -> None:
    options = tyro.cli(RayServe)
    try:
        options.run(make_console(), sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"jaxspec: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("jaxspec: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
