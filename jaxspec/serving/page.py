"""A web page for an engine: drop a picture, ask, watch the answer come with its draft tokens in colour, and see the
same answer without speculation.

    app = mount_page(FastAPI(), engine)

Whoever may open the page may ask. With an API key visitors sign in with it first; before that nothing of the page
works, uploads included. The page opens no files but uploaded ones, fetches nothing, keeps uploads for two hours at
most, and tells nobody of its visitors: no analytics, no sharing, no run history, no fonts from elsewhere.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from jaxspec import demo
from jaxspec.checks import whole_number
from jaxspec.generator import Piece
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.messages import Encoder
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.page_gate import HEARTBEAT, Gate, Page
from jaxspec.serving.panels import CSS, WAITING, Panel, beside, hint, sentence
from jaxspec.serving.requests import Refused, Stopping, Stream
from jaxspec.speculation.params import SamplingParams

log = logging.getLogger(__name__)

FRAME_SECONDS = 0.05
"""Between two pictures of a growing answer."""
UPLOADS_KEPT = 3600
"""Seconds, and seconds between two looks for what is older."""
MOST_TOKENS = 1024
"""Of an answer."""
HINT = "The answer appears here, with every token in the colour of where it came from."
Frame = tuple[Any, Any, Any, Any]  # of the panels and the three buttons


class Autoregressive:
    """An engine without a drafter on another engine's target, for comparison: made when it is first asked for. They
    share the parameters; caches and compiled programs are its own, for one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self._model, self._lock = engine, threading.Lock()
        self._made: Engine | None = None
        self._closed = False

    def engine(self) -> Engine:
        """Waits until both are ready: what is being compiled takes time from what is timed. Raises `Stopping` after
        `close`."""
        with self._lock:
            if self._made is None and not self._closed:
                settings = dataclasses.replace(self._model.settings, max_num_seqs=1, adaptive=False)
                self._made = Engine(self._model.target, settings=settings).start()
            made = self._made
        while made is not None and not (made.ready and self._model.ready) and not self._closed:
            time.sleep(0.05)
        if made is None or self._closed:
            raise Stopping("the server is stopping")
        return made

    def close(self) -> None:
        """Stop it if it was made; what it is answering is cancelled."""
        with self._lock:
            self._closed = True
            if self._made is not None:
                self._made.stop()


@dataclasses.dataclass
class Visit:
    """What is being answered to one visitor."""

    stream: Stream | None = None
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()


class Desk:
    """Takes the visitors' questions to the engines, one at a time for each visitor, within the limits of HTTP's: the
    same bounds on a prompt, the same threads, the same patience."""

    def __init__(self, engine: Engine, autoregressive: Autoregressive, encoder: Encoder) -> None:
        self.engine, self.autoregressive, self.encoder = engine, autoregressive, encoder
        self.patience = encoder.settings.request_timeout
        self.visits: dict[str, Visit] = {}  # by session

    async def ask(
        self,
        picture: dict[str, Any] | None,
        question: str,
        temperature: float,
        seed: float,
        limit: float,
        request: gr.Request,
    ) -> AsyncIterator[Frame]:
        """The answer as it comes."""
        drafter = self.engine.drafter
        title = "Answer" if drafter is None else f"Answer, drafted by {drafter.method}"
        panels = [Panel(title, drafter is not None, self.engine.tree.max_depth)]
        async for frame in self._answer(panels, picture, question, temperature, seed, limit, request):
            yield frame

    async def compare(
        self,
        picture: dict[str, Any] | None,
        question: str,
        temperature: float,
        seed: float,
        limit: float,
        request: gr.Request,
    ) -> AsyncIterator[Frame]:
        """The same answer with speculation, then without: at the same time each would slow the other down."""
        drafter = self.engine.drafter
        assert drafter is not None  # there is no button without one
        panels = [
            Panel(f"Speculative ({drafter.method})", True, self.engine.tree.max_depth),
            Panel("Autoregressive", False, 0, "comes next"),
        ]
        async for frame in self._answer(panels, picture, question, temperature, seed, limit, request):
            yield frame

    def stop(self, request: gr.Request) -> None:
        """End what is being answered to this visitor, who has left or says so."""
        if (visit := self.visits.get(str(request.session_hash))) is not None:
            visit.stop()

    async def _answer(
        self, panels: list[Panel], picture, question, temperature, seed, limit, request: gr.Request
    ) -> AsyncIterator[Frame]:
        session, visit = str(request.session_hash), Visit()
        self.stop(request)
        self.visits[session] = visit
        try:
            yield frame(beside(panels), busy=True)
            sampling = SamplingParams(temperature=temperature, seed=whole(seed))
            tokens = whole_number("the limit of tokens", whole(limit), 1)
            async with asyncio.timeout(self.patience):
                prompt = await self.encoder.encode_question(words(question), await asyncio.to_thread(uploaded, picture))
            engines = [self.engine]
            if len(panels) > 1:
                panels[0].note = "getting ready ..."
                yield moved(beside(panels))
                engines.append(await asyncio.to_thread(self.autoregressive.engine))
            for panel, engine in zip(panels, engines, strict=True):
                panel.note = WAITING
                if len(panels) > 1 and not visit.stopped:
                    visit.stream = engine.submit(prompt, sampling, tokens, client=session)
                    async with asyncio.timeout(self.patience):
                        await warm_up(visit.stream)
                if visit.stopped:
                    panel.note = "stopped"
                    continue
                visit.stream = stream = engine.submit(prompt, sampling, tokens, client=session)
                shown = 0.0
                async for piece in within(stream, self.patience):
                    if (result := piece.result) is not None and result.error is not None:
                        log.error("a question on the page could not be answered: %s (%s)", result.error, result.cause)
                    panel.add(piece, stream.served)
                    panel.tree = engine.stats().tree
                    if time.perf_counter() - shown >= FRAME_SECONDS:
                        yield moved(beside(panels))
                        shown = time.perf_counter()
            yield frame(beside(panels), busy=False)
        except (ValueError, Refused) as error:
            yield frame(sentence(str(error)) + beside_begun(panels), busy=False)
        except ApiError as error:
            yield frame(sentence(error.detail) + beside_begun(panels), busy=False)
        except TimeoutError:
            told = "the answer took longer than this server allows"
            yield frame(sentence(told) + beside_begun(panels), busy=False)
        except Exception:
            log.exception("a question on the page could not be answered")
            yield frame(sentence("the server could not answer; its log says why") + beside_begun(panels), busy=False)
        finally:
            visit.stop()
            if self.visits.get(session) is visit:
                del self.visits[session]


def make_page(
    engine: Engine,
    name: str | None = None,
    autoregressive: Autoregressive | None = None,
    encoder: Encoder | None = None,
) -> gr.Blocks:
    """The page of a running engine.

    Args:
      engine: with a drafter the page compares with decoding without it.
      name: of the model, as the page tells it; the folder's by default.
      autoregressive: what it compares with; by default an engine that lives as long as the process, see `mount_page`.
      encoder: makes the prompts, within its settings' limits; by default one with `HttpSettings`' own.

    It asks for no key: `mount_page` does.
    """
    encoder = encoder or Encoder(engine.target, engine.max_length, HttpSettings())
    desk = Desk(engine, autoregressive or Autoregressive(engine), encoder)
    most = min(MOST_TOKENS, engine.max_length)
    usual = SamplingParams()
    if engine.settings.generation_config:
        usual = usual.resolved(engine.target.generation_defaults)
    with Page(title="jaxspec", analytics_enabled=False, delete_cache=(UPLOADS_KEPT, UPLOADS_KEPT)) as page:
        gr.Markdown(heading(engine, name))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                picture = gr.Image(
                    label="Picture",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=250,
                    alt_text="The picture that is asked about",
                    elem_id="picture",
                )
                question = gr.Textbox(
                    "Describe the picture.", label="Question", lines=2, max_lines=8, elem_id="question", render=False
                )
                if engine.target.path == demo.target_path():
                    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps copies
                        pictures = example_pictures(Path(folder))
                        gr.Examples(
                            pictures,
                            [picture, question],
                            visible_columns=[0],
                            label="Or one of these",
                            elem_id="examples",
                        )
                question.render()
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
                    compare = gr.Button("Compare", min_width=90, elem_id="compare", visible=engine.drafter is not None)
                    stop = gr.Button("Stop", variant="stop", min_width=90, interactive=False, elem_id="stop")
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(
                        0, 2, min(2.0, usual.temperature), step=0.05, label="Temperature (0 is greedy)"
                    )
                    seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", elem_id="seed")
                    limit = gr.Slider(1, most, min(256, most), step=1, label="Most tokens of the answer")
            with gr.Column(scale=7, min_width=300):
                panels = gr.HTML(hint(HINT), css_template=CSS, elem_id="panels")
        given, shown = [picture, question, temperature, seed, limit], [panels, ask, compare, stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # The engine has a queue; Gradio's own must not stand before it, and must open no picture.
        options = quiet | {"concurrency_limit": None, "preprocess": False}
        gr.on([ask.click, question.submit], desk.ask, given, shown, **options)
        compare.click(desk.compare, given, shown, **options)
        stop.click(desk.stop, queue=False, **quiet)
        page.unload(desk.stop)
    return page


def mount_page(
    app: FastAPI,
    engine: Engine,
    path: str = "/",
    name: str | None = None,
    api_key: str | None = None,
    max_upload_bytes: int = 20 * 2**20,
) -> FastAPI:
    """Serve the page of an engine at `path` of an app, behind all routes that the app has already.

    In an app of `make_app` its limits hold for the page, too; in another one the usual ones of `HttpSettings` do. With
    an `api_key` visitors sign in with it as their password (under any name). What the app itself asks a key for must
    leave the page's paths alone, which a browser opens without one. The engine for comparisons stops with the app.
    """
    autoregressive = Autoregressive(engine)
    encoder = getattr(app.state, "encoder", None)
    if encoder is None:
        encoder = Encoder(engine.target, engine.max_length, HttpSettings())
    if (gate := getattr(app.state, "gate", None)) is not None:
        gate.heartbeat = f"{path.rstrip('/')}{HEARTBEAT}"

    def allowed(visitor: str, password: str) -> bool:
        del visitor
        return api_key is not None and secrets.compare_digest(password.encode(), api_key.encode())

    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[Any]:
        async with inner(app) as state:
            try:
                yield state
            finally:
                await asyncio.to_thread(autoregressive.close)
                encoder.close()

    app.router.lifespan_context = lifespan
    gr.mount_gradio_app(
        app,
        make_page(engine, name, autoregressive, encoder),
        path,
        auth=None if api_key is None else allowed,
        auth_message=None if api_key is None else "Any name will do; the password is the API key of this server.",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = Gate(mounted.app)
    return app


def words(question: Any) -> str:
    """The question as a browser sends it. Raises ValueError for what is no text."""
    if not isinstance(question, str):
        raise ValueError("the question must be a text")
    return question


def uploaded(picture: dict[str, Any] | None) -> bytes | None:
    """What is in the file that Gradio has found among the uploads. Raises ValueError."""
    if picture is None:
        return None
    try:
        return Path(picture["path"]).read_bytes()
    except (OSError, TypeError):
        raise ValueError("the picture is no longer there; upload it again") from None


async def within(stream: Stream, seconds: float | None) -> AsyncIterator[Piece]:
    """The pieces of an answer that has so long, the queue included. Raises TimeoutError."""
    deadline, pieces = None if seconds is None else asyncio.get_running_loop().time() + seconds, aiter(stream)
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        yield piece


async def warm_up(stream: Stream) -> None:
    """Whatever has to be compiled for such a request is, before another one is timed: two pieces are enough."""
    number = 0
    async for piece in stream:
        number += 1
        if number == 2 and piece.result is None:
            stream.cancel()


def whole(value: Any) -> Any:
    """A browser's number as int where it is a whole one; whatever else it sends is left to be refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def frame(html: str, busy: bool) -> Frame:
    """The panels, and which buttons work."""
    idle = gr.update(interactive=not busy)
    return html, idle, idle, gr.update(interactive=busy)


def moved(html: str) -> Frame:
    """The panels alone."""
    return html, gr.skip(), gr.skip(), gr.skip()


def beside_begun(panels: list[Panel]) -> str:
    """What had been answered when an error came."""
    begun = [panel for panel in panels if panel.tokens]
    return beside(begun) if begun else ""


def heading(engine: Engine, name: str | None) -> str:
    path = engine.target.path
    known = "the model" if path is None else path.name
    model = name or ("the embedded model" if path == demo.target_path() else known)
    drafts = "without a drafter" if engine.drafter is None else f"drafted by {engine.drafter.method}"
    promise = "The answers are those of the model alone, token by token; they only come sooner."
    return f"# jaxspec\n{model[:1].upper()}{model[1:]}, {drafts}. {promise if engine.drafter else ''}"


def example_pictures(folder: Path) -> list[list[str]]:
    """Scenes of the embedded model, as files, each with a question."""
    made = []
    for kind in ("count", "read", "locate", "compare"):
        (example,) = demo.examples("test", 1, kinds=[kind])
        path = folder / f"{kind}.png"
        example.image.save(path)
        made.append([str(path), example.question])
    return made
