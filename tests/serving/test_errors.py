"""Requests that are refused: the status, the parameter that is named, the code, and one sentence that says why."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from jaxspec.prompting import encode_prompt
from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.body import MAX_VALUES
from jaxspec.serving.http.errors import ApiError, as_api_error
from jaxspec.serving.http.messages import most_characters
from jaxspec.serving.http.schema import ChatRequest
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import QueueFull, Stopping
from jaxspec.speculation.params import SamplingParams
from tests.serving.asking import END, MODEL, TEXT, picture, user

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def app(engine):
    return make_app(engine, HttpSettings(max_images=2, max_n=4, max_pixels=200_000))


def post(app, content: bytes | None = None, **body) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            if content is not None:
                return await client.post(PATH, content=content, headers={"content-type": "application/json"})
            whole = {"model": MODEL, "messages": TEXT, "max_completion_tokens": 2, **body}
            return await client.post(PATH, json={name: value for name, value in whole.items() if value is not ...})

    return asyncio.run(ask())


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (
        error["type"] == {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}[status]
    )
    sentence = error["message"]
    assert sentence and "\n" not in sentence and len(sentence) < 400
    assert not any(word in sentence for word in ("Traceback", "site-packages", "object at 0x", ".py"))
    return error


def content(*parts: Any) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any, **more: Any) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


KNOWN = "unsupported_parameter"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REFUSED = [
    ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
    ({"best_of": 2}, "best_of", "unknown_parameter"),
    ({"ignore_eos": True}, "ignore_eos", "unknown_parameter"),
    ({"model": ...}, "model", "missing_required_parameter"),
    ({"messages": ...}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_type"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
    ({"messages": [*TEXT, {"role": "tool", "content": "x"}]}, "messages.1.role", "unsupported_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_type"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "invalid_type"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name", KNOWN),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [TOOL]}]}, "messages.0.tool_calls", KNOWN),
    ({"messages": [{"role": "user", "content": " \n"}]}, "messages", "invalid_value"),
    ({"messages": content({"type": "sound"})}, "messages.0.content.0.type", "unsupported_value"),
    ({"messages": content({"type": "text"})}, "messages.0.content.0.text", "missing_required_parameter"),
    ({"messages": content({"type": "text", "text": "a", "x": 1})}, "messages.0.content.0.x", "unknown_parameter"),
    ({"messages": [{"role": "system", "content": [image(picture(0))]}]}, "messages.0.content.0.type", None),
    ({"messages": content(image(picture(0), detail="high"))}, "messages.0.content.0.image_url.detail", KNOWN),
    ({"messages": content(image(5))}, "messages.0.content.0.image_url.url", "invalid_type"),
    ({"messages": content(image("data:image/png;base64,AAAA"))}, "messages.0.content.0.image_url", "invalid_value"),
    ({"messages": content(image("data:image/png;base64,é"))}, "messages.0.content.0.image_url", "invalid_value"),
    ({"messages": content(image("file:///etc/passwd"))}, "messages.0.content.0.image_url", "invalid_value"),
    ({"messages": content(image("https://example.org/a.png"))}, "messages.0.content.0.image_url", "invalid_value"),
    ({"messages": [user("all", 0), user("three", 1, 2)]}, "messages.1.content.1.image_url", "too_many_images"),
    ({"messages": [user("two", 0, 1)] * 1 + [user("x")], "n": 5}, "n", "invalid_value"),
    (
        {"messages": content({"type": "video_url", "video_url": {"url": "data:,"}})},
        "messages.0.content.0.video_url",
        None,
    ),
    ({"messages": [user("word " * 600)]}, "messages", "context_length_exceeded"),
    ({"messages": [user("word " * 200_000)]}, "messages", "context_length_exceeded"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 1e39}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**32}, "seed", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"logit_bias": {"50": 101}}, "logit_bias.50", "invalid_value"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
    ({"stop": ["a", 5]}, "stop.1", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 3}, "max_tokens", "invalid_value"),  # the other one says 2
    ({"min_tokens": 3}, "min_tokens", "invalid_value"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", KNOWN),
    ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"regex": "a+", "response_format": {"type": "json_object"}}, "regex", "invalid_value"),
    ({"regex": "a+", "min_tokens": 1}, "min_tokens", "invalid_value"),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"json": "no schema"}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "unknown_parameter"),
    ({"user": 5}, "user", "invalid_type"),
    ({"tools": [TOOL]}, "tools", KNOWN),
    ({"tool_choice": "required"}, "tool_choice", KNOWN),
    ({"functions": [TOOL]}, "functions", KNOWN),
    ({"modalities": ["text", "audio"]}, "modalities", KNOWN),
    ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", KNOWN),
    ({"store": True}, "store", KNOWN),
    ({"metadata": {"a": "b"}}, "metadata", KNOWN),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", KNOWN),
    ({"service_tier": "flex"}, "service_tier", KNOWN),
    ({"reasoning_effort": "high"}, "reasoning_effort", KNOWN),
    ({"web_search_options": {}}, "web_search_options", KNOWN),
]


@pytest.mark.parametrize(("body", "param", "code"), REFUSED, ids=[f"{row[1]}-{n}" for n, row in enumerate(REFUSED)])
def test_what_is_refused_is_named(app, body, param, code):
    error = error_of(post(app, **body))
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_values_that_change_nothing_are_taken(app):
    nothing = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "top_k": -1,
        "stop": [],
        "user": "ann",
        "response_format": {"type": "text"},
        "messages": [*TEXT, {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}, *TEXT],
    }
    nulls = {name: None for name in ChatRequest.model_fields if name not in ("model", "messages")}
    plain = post(app, messages=nothing["messages"]).json()["choices"]
    for body in (nothing, {**nulls, "max_tokens": 2, "messages": nothing["messages"]}):
        assert post(app, **body).json()["choices"] == plain


def test_another_model_is_404(app):
    error = error_of(post(app, model="gpt-4o"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_pixels_of_all_images_are_limited_together(app):
    assert post(app, messages=[user("two", 0, 1)]).status_code == 200  # 2 x 288 x 288
    crowded = make_app(app.state.engine, HttpSettings(max_pixels=100_000))
    error = error_of(post(crowded, messages=[user("two", 0, 1)]))
    assert (error["param"], error["code"]) == ("messages.0.content.1.image_url", "too_many_pixels")


WHOLE = json.dumps({"model": MODEL, "messages": TEXT})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        WHOLE.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        WHOLE[:-1].encode() + b', "temperature": NaN}',
        WHOLE[:-1].encode() + b', "temperature": Infinity}',
        WHOLE[:-1].encode() + b', "temperature": 1e999}',
        WHOLE[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}",
        WHOLE[:-1].encode() + b', "user": "\\ud800"}',
        WHOLE[:-1].encode() + b', "\\udfff": 1}',
        WHOLE[:-1].encode() + b', "metadata": [' + b"1," * MAX_VALUES + b"1]}",
        WHOLE[:-1].encode() + b', "' + b"x" * 100_000 + b'": 1}',
        WHOLE[:-1].encode() + b', "response_format": {"type": "' + b"x" * 100_000 + b'"}}',
    ],
    ids=range(18),
)
def test_bodies_that_are_no_request(app, body):
    error_of(post(app, content=body))


def test_a_full_queue_is_429(app, engine):
    prompt, streams = encode_prompt(engine.target, "What is a chart for?"), []
    sampling = SamplingParams(logit_bias={END: -100})
    try:
        with pytest.raises(QueueFull):
            for _ in range(1000):
                streams.append(engine.submit(prompt, sampling, 400))
        response = post(app)
        assert error_of(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
    finally:
        for stream in streams:
            stream.cancel()
        for stream in streams:
            stream.result()


def test_exceptions_that_nobody_expects_say_nothing():
    error = as_api_error(RuntimeError("/home/ann/weights is broken"))
    assert error.status_code == 500 and error.body["error"]["type"] == "server_error"
    assert "ann" not in error.detail
    assert "under req-7" in as_api_error(RuntimeError(), "req-7").detail
    assert as_api_error(Stopping("..")).status_code == 503
    assert as_api_error(TimeoutError()).status_code == 408


@pytest.mark.parametrize("error", [Stopping(".."), QueueFull(".."), ApiError(503, "x"), ApiError(429, "x")])
def test_whoever_may_ask_again_is_told_when(error):
    assert int(as_api_error(error).response().headers["retry-after"]) >= 1


def test_a_server_that_stops_or_is_not_ready_says_when_to_ask_again(app, engine, monkeypatch):
    async def ready() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/ready")

    monkeypatch.setattr(app.state.gate, "closed", True)
    responses = [asyncio.run(ready()), post(app)]
    monkeypatch.setattr(app.state.gate, "closed", False)
    monkeypatch.setattr(engine, "_warm", threading.Event())
    responses.append(asyncio.run(ready()))
    assert [response.status_code for response in responses] == [503, 503, 503]
    assert all(int(response.headers["retry-after"]) >= 1 for response in responses)


def test_time_is_counted_from_the_first_line_of_a_request(engine):
    """A body that takes its time leaves less for the answer."""
    app = make_app(engine, HttpSettings(request_timeout=2.0, body_timeout=10))
    body = json.dumps({"model": MODEL, "messages": TEXT, "max_completion_tokens": 2}).encode()

    async def slow():
        yield body[:10]
        await asyncio.sleep(2.2)
        yield body[10:]

    async def ask(content) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            headers = {"content-type": "application/json"}
            return (await client.post(PATH, content=content, headers=headers)).status_code

    async def both() -> tuple[int, int]:
        return await ask(slow()), await ask(body)

    post(make_app(engine), content=body)  # compiles
    assert asyncio.run(both()) == (408, 200)


def test_the_bound_on_characters_refuses_no_prompt_that_fits(engine):
    """The longest text of so many tokens, spaces apart, is below the bound."""
    tokenizer, length = engine.target.tokenizer, engine.max_length
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.decode([tokenizer.convert_tokens_to_ids(longest)] * length)
    assert sum(map(len, text.split())) <= most_characters(tokenizer, length)
