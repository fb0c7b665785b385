"""The official `openai` client against a server: every answer is the one that `Generator` gives to the same request."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.settings import HttpSettings
from tests.serving.asking import CASES, END, MODEL, ONE, SEEDS, TEXT, TOKENS, user
from tests.serving.listening import Listening, eventually


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[dict], stream: bool = False, **options) -> ChatCompletion:
    """The options may be any of the body's."""
    own = {name: options.pop(name) for name in ("stream_options",) if name in options}
    return client.chat.completions.create(
        model=MODEL, messages=messages, stream=stream, extra_body={"max_tokens": TOKENS, **options}, **own
    )


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> tuple[str, str | None]:
    """Text and finish reason of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    assert choices[0].delta.role == "assistant" and not choices[0].delta.content
    assert all(choice.finish_reason is None for choice in choices[:-1])
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_generator(client, expected, case, stream):
    messages, options, _ = CASES[case]
    result = expected[case]
    if stream:
        with ask(client, messages, stream=True, stream_options={"include_usage": True}, **options) as events:
            *chunks, last = list(events)
        text, reason = joined(chunks)
        assert last.choices == [] and all(chunk.usage is None for chunk in chunks)
        usage = last.usage
    else:
        answer = ask(client, messages, **options)
        (choice,) = answer.choices
        assert choice.message.role == "assistant" and answer.model == MODEL
        text, reason, usage = choice.message.content, choice.finish_reason, answer.usage
    assert (text, reason) == (result.text, result.finish_reason)
    counts = result.stats.prompt_tokens, len(result.tokens)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (*counts, sum(counts))


def test_cases_are_of_every_kind(expected):
    assert {expected[case].finish_reason for case in CASES} == {"stop", "length"}
    texts = {case: expected[case].text for case in CASES}
    assert len({*texts.values()}) == len(texts), texts


def test_usage_tells_what_the_drafter_earned(client, expected):
    told = ask(client, ONE).usage.model_extra["metrics"]
    about = told["speculative_decoding"]
    assert about["mean_acceptance_length"] == pytest.approx(1 + about["mean_accepted_draft_tokens"])
    assert about["rounds"] * about["mean_acceptance_length"] == pytest.approx(len(expected["one image"].tokens) - 1)
    assert 0 <= told["queue_seconds"] <= told["time_to_first_token"] <= told["total_seconds"]


def test_a_seed_gives_one_answer_whatever_else_runs(url, expected):
    """Sixteen requests of four kinds at once, each as if it were alone."""
    names = ["sampled", "filtered", "text", "seed 1"]
    kinds = [(CASES | SEEDS)[name] for name in names]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def one(messages, options, stream):
                body = {"model": MODEL, "messages": messages, "stream": stream}
                answer = await client.chat.completions.create(**body, extra_body={"max_tokens": TOKENS, **options})
                return joined([chunk async for chunk in answer])[0] if stream else answer.choices[0].message.content

            return await asyncio.gather(
                *(one(messages, options, bool(turn % 2)) for turn in range(4) for messages, options, _ in kinds)
            )

    assert asyncio.run(together()) == 4 * [expected[name].text for name in names]


def test_without_a_seed_answers_differ(client):
    answers = {ask(client, ONE, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_choice_has_a_seed_of_its_own(client, expected, stream):
    first, *_ = SEEDS.values()
    results = [expected[name] for name in list(SEEDS)[:3]]
    answer = ask(client, ONE, n=3, stream=stream, **first.options)
    if stream:
        chunks = list(answer)
        found = [joined(chunks, index) for index in range(3)]
    else:
        found = [(each.message.content, each.finish_reason) for each in answer.choices]
        assert [each.index for each in answer.choices] == [0, 1, 2]
        assert answer.usage.completion_tokens == sum(len(result.tokens) for result in results)
    assert found == [(result.text, result.finish_reason) for result in results]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("count", [None, 0, 5])
def test_logprobs_are_those_of_the_generator(client, expected, count, stream):
    result = expected[f"{count or 0} alternatives"]
    options = {} if count is None else {"top_logprobs": count}
    answer = ask(client, ONE, logprobs=True, stream=stream, **options)
    if stream:
        told = [entry for chunk in answer for each in chunk.choices if each.logprobs for entry in each.logprobs.content]
    else:
        told = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in told] == pytest.approx(result.logprobs.token_logprobs.tolist(), abs=1e-4)
    text = b"".join(bytes(entry.bytes or []) for entry in told).decode()
    assert text.lstrip() == result.text
    assert "".join(entry.token for entry in told if entry.bytes is not None).lstrip() == result.text
    for entry, values in zip(told, result.logprobs.top_logprobs, strict=True):
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        if count:
            assert entry.token == entry.top_logprobs[0].token


def test_no_limit_means_all_that_the_prompt_leaves(client, engine):
    unbounded = {"logit_bias": {str(END): -100}}
    answer = client.chat.completions.create(model=MODEL, messages=TEXT, **unbounded)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == engine.max_length


SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}
GRAMMARS = pytest.mark.xfail(strict=False, reason="the engine does not follow grammars yet")


@GRAMMARS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_json_schema_is_followed(client, stream):
    asked = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": SCHEMA, "strict": True}}
    answer = ask(client, ONE, response_format=asked, stream=stream, max_tokens=64)
    text = joined(list(answer))[0] if stream else answer.choices[0].message.content
    value = json.loads(text)
    assert value.keys() == {"shape", "count"}
    assert value["shape"] in ("circle", "square") and value["count"] in range(10)


@GRAMMARS
@pytest.mark.parametrize(
    "options", [{"regex": "(red|blue) [0-9]{2}"}, {"structured_outputs": {"regex": "(red|blue) [0-9]{2}"}}]
)
def test_regular_expressions_are_followed(client, options):
    text = ask(client, ONE, **options).choices[0].message.content
    assert text[:-3] in ("red", "blue") and text[-2:].isdecimal()


def refusal(client: openai.OpenAI, kind: type[openai.APIStatusError], **options) -> openai.APIStatusError:
    with pytest.raises(kind) as caught:
        ask(client, options.pop("messages", TEXT), **options)
    assert caught.value.message and "Traceback" not in caught.value.message
    return caught.value


def test_errors_are_the_clients_own_classes(client):
    refused = refusal(client, openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (refused.status_code, refused.param, refused.code) == (400, "tools", "unsupported_parameter")
    refused = refusal(client, openai.BadRequestError, temperature=-1)
    assert refused.param == "temperature" and "-1" in refused.message
    refused = refusal(client, openai.BadRequestError, messages=[user("word " * 600)])
    assert refused.code == "context_length_exceeded" and "512" in refused.message
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="another", messages=TEXT)
    assert caught.value.code == "model_not_found"


def test_models(client, engine):
    (model,) = client.models.list().data
    assert model.id == MODEL and model.model_extra["max_model_len"] == engine.max_length
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


def test_the_wrong_key(engine):
    with Listening(make_app(engine, HttpSettings(api_key="sk-right"))) as port:
        for key in ("sk-right", "sk-wrong"):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
            if key == "sk-right":
                assert ask(client, TEXT).choices
            else:
                assert refusal(client, openai.AuthenticationError).status_code == 401


def test_a_client_that_leaves_gives_its_slot_back(client, engine):
    before = engine.stats().finished.get("cancelled", 0)
    long = {"max_tokens": 400, "logit_bias": {str(END): -100}}
    with ask(client, TEXT, stream=True, n=2, **long) as events:
        next(iter(events))
    assert eventually(lambda: engine.stats().finished.get("cancelled", 0) == before + 2, 20)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), TEXT, n=2, **long)
    assert eventually(lambda: engine.stats().finished.get("cancelled", 0) == before + 4, 20)
    assert eventually(lambda: engine.stats().running == engine.stats().waiting == 0, 20)


def test_an_answer_that_takes_too_long(engine):
    long = {"max_tokens": 400, "logit_bias": {str(END): -100}}
    with Listening(make_app(engine, HttpSettings(request_timeout=0.5))) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, TEXT, **long)
        assert (caught.value.status_code, caught.value.code) == (408, "timeout")
        with pytest.raises(openai.APIError, match="longer"), ask(client, TEXT, stream=True, **long) as events:
            texts = [chunk.choices[0].delta.content or "" for chunk in events]
            pytest.fail(f"the stream ended without an error after {len(texts)} chunks")
    assert eventually(lambda: engine.stats().running == engine.stats().waiting == 0, 20)
