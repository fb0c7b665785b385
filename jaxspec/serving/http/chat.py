"""POST /v1/chat/completions: from a validated request to a completion, or to a stream of chunks."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxspec.arguments import check_sampling
from jaxspec.detokenizer import TokenReader
from jaxspec.generator import Piece
from jaxspec.serving.engine import Engine
from jaxspec.serving.grammar import Grammars
from jaxspec.serving.http.answers import DONE, Answers, event
from jaxspec.serving.http.choices import Choices, Gone, Watch, unless_gone
from jaxspec.serving.http.errors import ApiError, as_api_error, timed_out
from jaxspec.serving.http.limits import deadline_of
from jaxspec.serving.http.messages import Encoder
from jaxspec.serving.http.parameters import choices_of, grammar_of, limit_of, naming, sampling_of
from jaxspec.serving.http.schema import ChatRequest
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import QueueFull

log = logging.getLogger(__name__)
LAST_WORDS_SECONDS = 5.0
"""For a client to read the error that says that its time is over."""


class Chat:
    """Answers chat requests with an engine. `close` ends its threads.

    Args:
      engine: that has been started.
      settings: of the server.
      fingerprint: of what answers.
      watch: what the pieces of an answer pass through.
    """

    def __init__(self, engine: Engine, settings: HttpSettings, fingerprint: str, watch: Watch) -> None:
        self.engine, self.settings, self.fingerprint, self.watch = engine, settings, fingerprint, watch
        self.encoder = Encoder(engine.target, engine.max_length, settings)
        self.reader = TokenReader(engine.target.tokenizer)
        target = engine.target
        self.grammars = Grammars(target.tokenizer, target.model.vocab_size, target.stop_token_ids)

    def close(self) -> None:
        self.encoder.close()

    async def answer(self, http: Request, request: ChatRequest) -> Response:
        """The response to one request; work on it ends where the client leaves. Raises ApiError and what the engine
        refuses with."""
        try:
            work = self.respond(
                request,
                http.client.host if http.client else "",
                deadline_of(http.scope, self.settings.request_timeout),
                http.state.request_id,
            )
            return await unless_gone(http, work)
        except Gone:
            return Response(status_code=499)  # which nobody reads

    async def respond(self, request: ChatRequest, host: str, deadline: float | None, request_id: str) -> Response:
        """The response to a request from a host, which has until then."""
        if request.model != self.settings.served_model_name:
            raise no_such_model(request.model)
        try:
            async with asyncio.timeout_at(deadline):
                choices, answers = await self.begin(request, host, deadline, request_id)
        except TimeoutError:
            raise timed_out() from None
        try:
            if request.stream:
                # So that an answer which fails before it begins has a status of its own.
                first = await choices.next()
                usage = request.stream_options is not None and bool(request.stream_options.include_usage)
                return Events(choices, chunks(choices, answers, first, usage))
            results = await choices.all_results()
            served = [stream.served for stream in choices.streams]
            if request.logprobs:  # as fast as the client reads it, and off the event loop
                return StreamingResponse(answers.written(results, served), media_type="application/json")
            return JSONResponse(answers.completion(results, served))
        except BaseException:
            choices.close()
            raise

    async def begin(
        self, request: ChatRequest, host: str, deadline: float | None, request_id: str
    ) -> tuple[Choices, Answers]:
        """Everything up to the request's place in the queue. Raises ApiError and what the engine refuses with."""
        n = request.n or 1
        if n > self.settings.max_n:
            raise ApiError(400, f"n must be at most {self.settings.max_n}, got {n}", "n", "invalid_value")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream to be true", "stream_options", "invalid_value")
        sampling, source = sampling_of(request), grammar_of(request)
        with naming(None):  # what costs nothing to check comes before pictures are read
            check_sampling(sampling, limit_of(request, self.engine.max_length), self.engine.target.model.vocab_size)
        self.check_queue()
        prompt = await self.encoder.encode(request.messages)
        grammar = None
        if source is not None:
            with naming(source.param):
                loop = asyncio.get_running_loop()
                grammar = await loop.run_in_executor(self.encoder.pool, source.compiled, self.grammars)
        limit = limit_of(request, self.engine.max_length - len(prompt.input_ids))
        streams = []
        try:
            with naming(None):
                for each in choices_of(sampling, n):
                    streams.append(self.engine.submit(prompt, each, limit, grammar, request.user or host))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        answers = Answers(request.model, self.fingerprint, self.reader, len(prompt.input_ids))
        return Choices(streams, deadline, self.watch, request_id), answers

    def check_queue(self) -> None:
        """Raises QueueFull before any work is done for a request that would not be taken."""
        stats, most = self.engine.stats(), self.engine.settings.max_queued_requests
        if stats.running >= stats.slots and stats.waiting >= most:
            raise QueueFull(f"{stats.waiting} requests wait already")


def no_such_model(name: str) -> ApiError:
    """The refusal of a request for another model."""
    return ApiError(404, f"the model {name[:100]!r} does not exist here", "model", "model_not_found")


class Events(StreamingResponse):
    """Server-sent events. However they end, with the client's leaving or without, the choices are closed; a client that
    does not read is left when its time is over."""

    media_type = "text/event-stream"

    def __init__(self, choices: Choices, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = self.choices.deadline
        try:
            async with asyncio.timeout_at(None if deadline is None else deadline + LAST_WORDS_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its answer in time")
        finally:
            self.choices.close()


async def chunks(choices: Choices, answers: Answers, first: tuple[int, Piece], usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream: roles, texts as they become certain, how each choice ended, usage if it was asked for.
    What goes wrong on the way is an event of its own, and the last one."""
    extra: dict[str, Any] = {"usage": None} if usage else {}
    try:
        for index in range(len(choices.streams)):
            yield event(answers.chunk(index, {"role": "assistant", "content": ""}) | extra)
        index, piece = first
        while True:
            logprobs = answers.logprobs(piece.tokens, piece.logprobs)
            if piece.text or (logprobs and logprobs["content"]):
                yield event(answers.chunk(index, {"content": piece.text}, logprobs) | extra)
            if piece.result is not None:
                yield event(answers.chunk(index, {}, finish_reason=piece.result.finish_reason) | extra)
            if choices.finished:
                break
            index, piece = await choices.next()
        if usage:
            served = [stream.served for stream in choices.streams]
            yield event(answers.usage_chunk(choices.known_results(), served))
        yield DONE
    except Exception as error:
        if not isinstance(error, ApiError):
            log.exception("the stream of request %s failed", choices.request_id)
        yield event(as_api_error(error, choices.request_id).body)
