"""A request's parameters in the engine's words: what is said, what is left to the target's folder, what is drawn."""

import pytest

from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.parameters import choices_of, grammar_of, limit_of, sampling_of
from jaxspec.serving.http.schema import ChatRequest
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.generation import GenerationDefaults

FOLDER = GenerationDefaults(do_sample=True, temperature=0.7, top_k=30, top_p=0.8, repetition_penalty=1.1)


def request(**body) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **body})


def test_what_is_left_out_or_null_is_the_folders():
    for body in ({}, {"temperature": None, "top_p": None}):
        sampling = sampling_of(request(seed=1, **body))
        assert sampling == SamplingParams(seed=1)
        resolved = sampling.resolved(FOLDER)
        assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.repetition_penalty) == (
            0.7,
            30,
            0.8,
            1.1,
        )


def test_what_is_said_counts_even_where_it_is_the_usual_value():
    said = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
    resolved = sampling_of(request(seed=1, **said)).resolved(FOLDER)
    assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.repetition_penalty) == (0, 0, 1, 1)
    assert sampling_of(request(seed=1, top_k=-1)).resolved(FOLDER).top_k == 0


def test_every_field_arrives():
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 2**32 - 1,
        "stop": "end",
        "stop_token_ids": [3, 4],
        "repetition_penalty": 1.3,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "min_tokens": 2,
        "logprobs": True,
        "top_logprobs": 4,
    }
    own = {**body, "logit_bias": {5: -100, 6: 1.5}, "stop": ("end",), "stop_token_ids": (3, 4), "logprobs": 4}
    del own["top_logprobs"]
    assert sampling_of(request(**body)) == SamplingParams(**own)
    assert {field for field in SamplingParams.__dataclass_fields__} == set(own)


def test_a_seed_is_drawn_where_none_is_given():
    assert len({sampling_of(request()).seed for _ in range(20)}) > 15
    assert [each.seed for each in choices_of(SamplingParams(seed=2**32 - 2), 4)] == [2**32 - 2, 2**32 - 1, 0, 1]


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({}, 40),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 100}, 40),
    ],
)
def test_limits(body, limit):
    assert limit_of(request(**body), 40) == limit


def test_grammars():
    schema = {"type": "object"}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for body, kind, source in (
        ({"response_format": wrapped}, "json_schema", schema),
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        ({"regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": schema}}, "json_schema", schema),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema", schema),
    ):
        found = grammar_of(request(**body))
        assert (found.kind, found.source) == (kind, source) and found.param in body
    assert grammar_of(request(response_format={"type": "text"})) is None
    assert grammar_of(request()) is None
    with pytest.raises(ApiError):
        grammar_of(request(structured_outputs={"regex": "a", "json": {}}))
