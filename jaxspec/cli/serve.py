"""`python -m jaxspec serve`: an OpenAI-compatible server of a target and its drafter."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxspec.checks import shown, whole_number
from jaxspec.cli.options import ModelOptions, TreeOptions
from jaxspec.cli.output import show_warning, waiting
from jaxspec.programs import CHUNK
from jaxspec.serving.requests import MIB, EngineSettings
from jaxspec.serving.speculative import NONE, SpeculativeConfig
from jaxspec.stopping import Broken

if TYPE_CHECKING:
    from jaxspec.serving.engine import Engine
    from jaxspec.serving.http.settings import HttpSettings

KEY_VARIABLE = "JAXSPEC_API_KEY"
PARTS = {"image": "max_images", "video": "max_videos"}
"""What --limit-mm-per-prompt limits, and the field of `HttpSettings` for it."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Answer OpenAI's chat completions, many at once, with speculative decoding: text, pictures, streams.

    Without options the embedded model and its ViSpec drafter are served on 127.0.0.1, port 8000. One line says when the
    server is ready. Ask it with any OpenAI client (base_url http://127.0.0.1:8000/v1) or with curl:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"model": "demo", "messages": [{"role": "user", "content": "What is a chart for?"}]}'

    SIGTERM and Ctrl-C end it without losing an accepted request; a second one ends it at once.
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions()
    speculative_config: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """How to draft, as {"method": "vispec", "model": "FOLDER or REPO"}; with "num_speculative_tokens" a chain, with
    "depth", "top_k" and "total_tokens" (the root counted) another tree than the drafter's own, with "adaptive": false
    always the whole tree. null decodes autoregressively. By default the embedded model has its ViSpec drafter, others
    have none."""
    tree: Annotated[TreeOptions, tyro.conf.arg(name="")] = TreeOptions()
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine. Without a key only 127.0.0.1 is safe."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    api_key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = dataclasses.field(default=None, repr=False)
    """Key that every request but GET /health must carry. Better in the environment, as JAXSPEC_API_KEY: there no list
    of processes shows it."""
    served_model_name: str | None = None
    """What requests call the model; by default what --model says."""
    max_num_seqs: int = 8
    """Requests that are answered at once; more slots take more memory and make each step longer."""
    max_queued_requests: int = 256
    """Requests that may wait for a slot; further ones are answered with 429."""
    prefill_chunk: int = CHUNK
    """Tokens of a prompt that are read between two rounds of the others: less lets the others wait less."""
    batch_invariant: bool = False
    """Round numbers alike whatever else is asked: all slots and the whole tree always, prompts read from their
    beginning. Matters in bfloat16, and costs speed."""
    image_cache_mib: int = 256
    """MiB for features of images seen before; 0 keeps none."""
    prefix_cache_mib: int | None = None
    """MiB for prompts read before; 0 keeps none. By default a quarter of what the slots take, and 256 at least."""
    limit_mm_per_prompt: Annotated[str, tyro.conf.arg(metavar="JSON")] = '{"image": 16, "video": 1}'
    """Most images and videos of one prompt."""
    allowed_media_domains: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="HOST")] = ()
    """A host, with its subdomains, that images and videos may be fetched from; to be given again for further ones. By
    default there is none, and they come as data: URLs only."""
    allowed_hosts: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="HOST")] = ()
    """A name that requests may call the server by, in their Host header; to be given again for further ones, "*" is
    any. By default localhost, 127.0.0.1 and [::1] where the server has no key and listens for this machine alone, so
    that no web page comes to it through a name of its own; else any."""
    max_body_mib: int = 64
    """MiB of a request; larger ones are answered with 413."""
    max_total_body_mib: int = 512
    """MiB of all requests that are being answered, together; those beyond it are answered with 503."""
    request_timeout: float = 600.0
    """Seconds that a request may take from its first line to its last token, body and waiting included."""
    web_page: bool = False
    """Also serve a web page for a browser, under /: a picture, a question, the answer with accepted draft tokens
    coloured. Where there is a key, the browser asks for it as a password; any user name will do."""
    shutdown_timeout: float = 60.0
    """Seconds that accepted requests have to finish after SIGTERM or Ctrl-C; the others are then cancelled."""

    def run(self, console: Console, arguments: list[str]) -> None:
        del arguments
        self.check()
        with needing_extra():
            from jaxspec.serving.http.app import make_app
            from jaxspec.serving.http.server import Server, bind

        settings = self.http_settings()
        with bind(self.host, self.port) as bound:
            self.warn_without_key(console, settings)
            with waiting(console, "loading ..."):
                engine = self.load_engine()
            app = make_app(engine, settings)
            if self.web_page:
                with needing_extra():
                    from jaxspec.serving.page import mount_page

                mount_page(app, engine, name=settings.served_model_name)  # the key and the limits are the app's
            host, port = f"[{self.host}]" if ":" in self.host else self.host, bound.getsockname()[1]

            def ready() -> None:
                console.print(self.about(engine, settings))
                if self.web_page:
                    say(console, f"page: http://{host}:{port}/")
                say(console, f"ready: http://{host}:{port}/v1")

            def stopping(inside: int) -> None:
                say(console, f"stopping when {inside} accepted requests are answered; a second signal stops at once")

            say(console, "compiling ..")
            server = Server(app, engine.start(), settings, self.shutdown_timeout, ready, stopping)
            try:
                server.serve_on(bound)
            finally:
                if engine.ready:
                    engine.stop()
            if engine.failure is not None:
                raise Broken(engine.failure)
            say(console, "stopped")
            if not engine.ready:
                leave()

    def check(self) -> None:
        """Raises ValueError for what cannot be, before anything is loaded."""
        self.engine_settings(self.speculative.adaptive)
        whole_number("tensor", self.model.tensor, 1)
        if self.model.quantize_drafter and self.speculative.method == NONE:
            raise ValueError("quantize-drafter needs a drafter: give --speculative-config")
        if not self.shutdown_timeout >= 0:
            raise ValueError(f"shutdown_timeout must be at least 0, got {self.shutdown_timeout}")

    @property
    def speculative(self) -> SpeculativeConfig:
        """What --speculative-config and the options of the tree mean. Raises ValueError."""
        if self.speculative_config is None:
            config = SpeculativeConfig.default(self.model.target)
        else:
            config = SpeculativeConfig.parse(self.speculative_config)
        return config.with_tree(self.tree.given)

    def load_engine(self) -> "Engine":
        """The engine, not started yet."""
        from jaxspec.serving.engine import Engine

        speculative = self.speculative
        target = self.model.load()
        drafter, tree = speculative.load(target, self.model.embedded, self.model.quantize_drafter)
        return Engine(target, drafter, tree, self.engine_settings(speculative.adaptive))

    def http_settings(self) -> "HttpSettings":
        """How the HTTP server behaves. Raises ValueError."""
        with needing_extra():
            from jaxspec.serving.http.settings import HttpSettings

        return HttpSettings(
            served_model_name=self.served_model_name or self.model.target,
            api_key=self.key(),
            max_body_bytes=self.max_body_mib * MIB,
            max_total_body_bytes=self.max_total_body_mib * MIB,
            allowed_hosts=self.hosts(),
            allowed_media_domains=self.allowed_media_domains,
            request_timeout=self.request_timeout,
            **self.limits(),
        )

    def hosts(self) -> tuple[str, ...]:
        """Names that requests may call the server by; none for any."""
        from jaxspec.serving.http.server import LOOPBACK, is_loopback

        if self.allowed_hosts or self.key() is not None or not is_loopback(self.host):
            return self.allowed_hosts
        return (*LOOPBACK, self.host)

    def warn_without_key(self, console: Console, settings: "HttpSettings") -> None:
        """Where others than this machine's own users are answered without a key."""
        from jaxspec.serving.http.server import is_loopback

        if settings.api_key is None and not is_loopback(self.host):
            show_warning(console, f"without a key ({KEY_VARIABLE}) anybody who reaches {self.host} is answered")

    def key(self) -> str | None:
        """The API key, from the command line or the environment. Raises ValueError for an empty one: whoever sets it
        means to close the server, not to open it."""
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        if key == "":
            raise ValueError(f"the API key is empty; leave --api-key or {KEY_VARIABLE} out to serve everybody")
        return key

    def limits(self) -> dict[str, int]:
        """The fields of `HttpSettings` that --limit-mm-per-prompt means; what it leaves out stays as it is."""
        try:
            raw = json.loads(self.limit_mm_per_prompt)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict) or not set(raw) <= set(PARTS):
            raise ValueError(
                'limit-mm-per-prompt must be JSON such as {"image": 4, "video": 0}, got '
                + shown(self.limit_mm_per_prompt)
            )
        return {PARTS[kind]: whole_number(f"limit-mm-per-prompt: {kind}", raw[kind], 0) for kind in raw}

    def engine_settings(self, adaptive: bool) -> EngineSettings:
        """What the engine is told."""
        for name in ("image_cache_mib", "prefix_cache_mib"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        return EngineSettings(
            max_length=self.model.max_length,
            max_num_seqs=self.max_num_seqs,
            max_queued_requests=self.max_queued_requests,
            adaptive=adaptive,
            prefill_chunk=self.prefill_chunk,
            batch_invariant=self.batch_invariant,
            image_cache_bytes=self.image_cache_mib * MIB,
            prefix_cache_bytes=None if self.prefix_cache_mib is None else self.prefix_cache_mib * MIB,
            generation_config=self.model.generation_config,
        )

    def about(self, engine: "Engine", settings: "HttpSettings") -> Table:
        """What is served, in a few lines."""
        drafter, tree = "none: autoregressive decoding", engine.tree
        if engine.drafter is not None:
            drafter = (
                f"{engine.drafter.method}, tree {tree.depth}/{tree.top_k}/{tree.total_tokens} (depth/top-k/tokens)"
            )
            drafter += ", as much as pays" if engine.settings.adaptive else ", always all of it"
        domains = ", ".join(settings.allowed_media_domains)
        about = Table.grid(padding=(0, 2))
        for name, value in (
            ("model", f"{settings.served_model_name} ({self.model.target}, {self.model.precision})"),
            ("drafter", drafter),
            ("requests", f"{self.max_num_seqs} at once, {self.max_queued_requests} may wait"),
            ("length", f"{engine.max_length} tokens of prompt and answer"),
            ("per prompt", f"{settings.max_images} images, {settings.max_videos} videos"),
            ("images from", f"data: URLs and {domains}" if domains else "data: URLs"),
            ("caches", f"{self.image_cache_mib} MiB of images, {engine.prefix_cache_bytes // MIB} MiB of prompts"),
            ("key", "needed" if settings.api_key else "not needed"),
        ):
            about.add_row(name, Text(value))
        return about


@contextlib.contextmanager
def needing_extra() -> Generator[None]:
    """Turns a missing package into the sentence that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'jaxspec-vlm[serve]'") from None


def leave() -> NoReturn:
    """Ends the process while something compiles, which nothing can stop: a usual end would wait for it or be aborted by
    it. Whoever was accepted has been answered."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
