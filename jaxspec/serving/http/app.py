"""`make_app`: an engine as OpenAI's HTTP interface. What is answered is true of its /openapi.json, too."""

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

import jaxspec
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.body import JsonRoute
from jaxspec.serving.http.chat import Chat, no_such_model
from jaxspec.serving.http.errors import ApiError, ErrorAnswer, add_error_handlers
from jaxspec.serving.http.limits import Gate, add_limits
from jaxspec.serving.http.metrics import Metrics, add_metrics
from jaxspec.serving.http.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Health,
    Model,
    ModelList,
    Ready,
)
from jaxspec.serving.http.settings import HttpSettings

REASONS = {
    400: "The request cannot be answered as it is; `param` names what is wrong.",
    401: "The key is wrong or missing.",
    403: "The server does not answer under the name in the Host header.",
    404: "There is no such model.",
    408: "The body or the answer took too long.",
    413: "The body is too large, or there is one where none is taken.",
    415: "The body is not JSON.",
    429: "Too many requests wait already.",
    500: "The answer could not be computed.",
    503: "The server is not ready, is stopping, or has too many bytes of requests already.",
}


REFERENCE = "#/components/schemas/{model}"


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How OpenAPI is told of them."""
    return {status: {"model": ErrorAnswer, "description": REASONS[status]} for status in statuses}


def make_app(engine: Engine, settings: HttpSettings = HttpSettings()) -> FastAPI:
    """The app of an engine that has been started. `app.state.gate` says who is inside and whether more are let in,
    `app.state.encoder` makes prompts within the settings' limits."""
    gate, metrics = Gate.of(engine.settings), Metrics(engine)
    chat = Chat(engine, settings, fingerprint(engine), metrics.watched)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        chat.close()

    app = FastAPI(
        title="jaxspec",
        version=jaxspec.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.engine, app.state.settings, app.state.gate, app.state.metrics = engine, settings, gate, metrics
    app.state.encoder = chat.encoder
    add_error_handlers(app)
    add_limits(app, settings, gate)
    add_metrics(app, metrics)
    app.include_router(chat_router(chat))
    app.include_router(about_router(gate, engine, settings))
    app.openapi = lambda: openapi(app, settings)
    return app


def chat_router(chat: Chat) -> APIRouter:
    """POST /v1/chat/completions."""
    router = APIRouter(route_class=JsonRoute)
    stream = {"schema": {"$ref": REFERENCE.format(model="ChatCompletionChunk")}}

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        operation_id="create_chat_completion",
        response_model=ChatCompletion,
        responses=refusals(*REASONS)
        | {200: {"description": "The answer, whole or as events.", "content": {"text/event-stream": stream}}},
    )
    async def create_chat_completion(http: Request, request: ChatRequest) -> Response:
        """Messages in, an answer out: whole, or with `stream` in server-sent events."""
        return await chat.answer(http, request)

    return router


def about_router(gate: Gate, engine: Engine, settings: HttpSettings) -> APIRouter:
    """What the server is and how it does."""
    router = APIRouter()
    tree, created = engine.tree, int(time.time())
    model = Model(
        id=settings.served_model_name,
        object="model",
        created=created,
        owned_by="jaxspec",
        max_model_len=engine.max_length,
        drafter=engine.drafter.method if engine.drafter else None,
        tree=f"{tree.depth}/{tree.top_k}/{tree.total_tokens}" if engine.drafter else "none",
    )

    @router.get("/v1/models", summary="The model that is served", responses=refusals(401, 403, 413, 429, 500, 503))
    async def list_models() -> ModelList:
        return ModelList(object="list", data=[model])

    @router.get(
        "/v1/models/{name:path}", summary="About one model", responses=refusals(401, 403, 404, 413, 429, 500, 503)
    )
    async def retrieve_model(name: str) -> Model:
        if name != model.id:
            raise no_such_model(name)
        return model

    @router.get("/health", summary="Whether the server lives", responses=refusals(403, 413, 500))
    async def health() -> Health:
        if engine.failure is not None:
            raise ApiError(500, "the engine has stopped; the server's log says why", code="engine_failed")
        stats = engine.stats()
        return Health(
            status="ok",
            version=jaxspec.__version__,
            model=model.id,
            running=stats.running,
            waiting=stats.waiting,
            slots=stats.slots,
        )

    @router.get("/ready", summary="Whether it takes requests", responses=refusals(401, 403, 413, 500, 503))
    async def ready() -> Ready:
        if gate.closed:
            raise ApiError(503, "the server is stopping", code="stopping")
        if not engine.ready:
            raise ApiError(503, "the server is still getting ready", code="not_ready")
        return Ready(status="ready")

    return router


def fingerprint(engine: Engine) -> str:
    """Names what answers: this version and the target's weights. The drafter changes no answer."""
    return f"jaxspec-{jaxspec.__version__}-{engine.target.fingerprint() or 'unnamed'}"


def openapi(app: FastAPI, settings: HttpSettings) -> dict[str, Any]:
    """FastAPI's schema, without the 422 that it takes for granted, and with the key where one is needed."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        chunk = ChatCompletionChunk.model_json_schema(ref_template=REFERENCE, mode="serialization")
        schemas |= chunk.pop("$defs") | {"ChatCompletionChunk": chunk}
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if settings.api_key is not None and path != "/health":
                    operation["security"] = [{"key": []}]
        if settings.api_key is not None:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema
