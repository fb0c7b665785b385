"""`make_app`: the HTTP server of an engine."""

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

import jaxspec
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.errors import ApiError, add_error_handlers
from jaxspec.serving.http.limits import Gate, add_limits
from jaxspec.serving.http.metrics import Metrics, add_metrics
from jaxspec.serving.http.settings import HttpSettings


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None


def make_app(engine: Engine, settings: HttpSettings = HttpSettings()) -> FastAPI:
    """The app of a started engine."""
    app = FastAPI(title="jaxspec", version=jaxspec.__version__, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    app.state.gate, app.state.metrics = Gate.of(engine.settings), Metrics(engine)
    pool = ThreadPoolExecutor(settings.encode_threads, "encode")
    created = int(time.time())
    add_error_handlers(app)
    add_limits(app, settings, app.state.gate)
    add_metrics(app, app.state.metrics)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": jaxspec.__version__, "model": settings.served_model_name}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        if app.state.gate.closed or not engine.ready:
            raise ApiError(503, "the server is not ready", code="not_ready")
        return {"status": "ready"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"id": settings.served_model_name, "object": "model", "created": created, "owned_by": "jaxspec"}
        return {"object": "list", "data": [about | {"max_model_len": engine.max_length}]}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            prompt = await loop.run_in_executor(pool, encode_prompt, engine.target, body.messages)
            stream = engine.submit(prompt, max_new_tokens=body.max_tokens or 256)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        result = None
        async for piece in app.state.metrics.watched(stream):
            result = piece.result
        assert result is not None
        message = {"role": "assistant", "content": result.text}
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": settings.served_model_name,
            "choices": [{"index": 0, "message": message, "finish_reason": result.finish_reason}],
        }

    return app
