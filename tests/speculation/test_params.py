"""Sampling parameters: what is refused, what stays unset, and what a folder puts in its place."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import SamplingParams
from jaxspec.speculation.params import FOLDER_FIELDS, BatchSampling, Unset
from jaxspec.targets.generation import GenerationDefaults

SAMPLED = GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05, min_new_tokens=3)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", -0.1, "temperature must be finite and at least 0, got -0.1"),
        ("temperature", float("nan"), "temperature must be finite and at least 0, got nan"),
        ("temperature", float("inf"), "temperature must be finite and at least 0, got inf"),
        ("temperature", 1e39, "temperature must be finite and at least 0, got 1e+39"),
        ("temperature", True, "temperature must be a number, got True"),
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("top_p", 0.0, "top_p must be greater than 0 and at most 1, got 0.0"),
        ("top_p", 1.1, "top_p must be greater than 0 and at most 1, got 1.1"),
        ("top_k", -1, "top_k must be between 0 and 2147483647, got -1"),
        ("top_k", 1.5, "top_k must be an integer, got 1.5"),
        ("min_p", -0.5, "min_p must be between 0 and 1, got -0.5"),
        ("min_p", 2, "min_p must be between 0 and 1, got 2.0"),
        ("seed", -1, "seed must be between 0 and 4294967295, got -1"),
        ("seed", 2**32, "seed must be between 0 and 4294967295, got 4294967296"),
        ("seed", None, "seed must be an integer, got None"),
        ("stop", ("",), "stop must hold non-empty strings, got ''"),
        ("stop", "\ud800", "a stop string cannot be written as UTF-8: character 0 is '\\ud800'"),
        ("stop", 3, "stop must be a sequence, got 3"),
        ("stop_token_ids", ("x",), "stop_token_ids must be an integer, got 'x'"),
        ("stop_token_ids", (-3,), "stop_token_ids must be between 0 and 2147483647, got -3"),
        ("repetition_penalty", 0, "repetition_penalty must be between 1e-05 and 100000, got 0.0"),
        ("repetition_penalty", float("nan"), "repetition_penalty must be between 1e-05 and 100000, got nan"),
        ("repetition_penalty", "1.2", "repetition_penalty must be a number, got '1.2'"),
        ("presence_penalty", 2.5, "presence_penalty must be between -2 and 2, got 2.5"),
        ("presence_penalty", None, "presence_penalty must be a number, got None"),
        ("frequency_penalty", float("-inf"), "frequency_penalty must be between -2 and 2, got -inf"),
        ("logit_bias", None, "logit_bias must be a mapping of token ids to numbers, got None"),
        ("logit_bias", 3, "logit_bias must be a mapping of token ids to numbers, got 3"),
        ("logit_bias", [3, 4], "logit_bias must be a mapping of token ids to numbers, got [3, 4]"),
        ("logit_bias", {"3": 1.0}, "a token id of logit_bias must be an integer, got '3'"),
        ("logit_bias", {-3: 1.0}, "a token id of logit_bias must be between 0 and 2147483647, got -3"),
        ("logit_bias", {3: 101}, "the logit_bias of token 3 must be between -100 and 100, got 101.0"),
        ("logit_bias", {3: float("nan")}, "the logit_bias of token 3 must be between -100 and 100, got nan"),
        ("logit_bias", {3: "x"}, "the logit_bias of token 3 must be a number, got 'x'"),
        ("logit_bias", [(3, 1), (3, 2)], "logit_bias has token 3 twice"),
        ("min_tokens", -1, "min_tokens must be between 0 and 2147483647, got -1"),
        ("min_tokens", 1.0, "min_tokens must be an integer, got 1.0"),
        ("logprobs", 21, "logprobs must be between 0 and 20, got 21"),
        ("logprobs", True, "logprobs must be an integer, got True"),
    ],
)
def test_a_bad_parameter_is_refused_in_one_sentence(field, value, message):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{field: value})
    assert str(error.value) == message


def test_values_are_normalised():
    params = SamplingParams(
        logit_bias={np.int64(7): 1, 2: np.float32(-0.5)}, logprobs=np.int32(0), repetition_penalty=2
    )
    assert params.logit_bias == ((2, -0.5), (7, 1.0)) and params.logprobs == 0
    assert params.penalises and not SamplingParams(logprobs=3, temperature=1.0).penalises
    assert hash(params) == hash(dataclasses.replace(params)) and dataclasses.replace(params) == params
    assert SamplingParams(repetition_penalty=1.0, logit_bias={}) == SamplingParams()


def unset(params: SamplingParams) -> set[str]:
    return {name for name in FOLDER_FIELDS if isinstance(getattr(params, name), Unset)}


def test_unset_fields_equal_their_defaults_and_stay_unset():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)
    assert (params.repetition_penalty, params.presence_penalty, params.min_tokens) == (1, 0, 0)
    assert unset(params) == set(FOLDER_FIELDS) and len(FOLDER_FIELDS) == 8
    assert json.dumps(dataclasses.asdict(params)) and repr(params.temperature) == "0.0"
    some = dataclasses.replace(SamplingParams(1.0, min_tokens=0), seed=5)
    for each in (some, copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
        assert unset(each) == set(FOLDER_FIELDS) - {"temperature", "min_tokens"}
    resolved = params.resolved(GenerationDefaults())
    assert resolved == params and not unset(resolved)


def test_the_folder_fills_what_is_unset():
    assert SamplingParams().resolved(SAMPLED) == SamplingParams(
        temperature=0.6, top_p=0.9, repetition_penalty=1.05, min_tokens=3
    )
    given = SamplingParams(temperature=0.0, repetition_penalty=1.0, min_tokens=0, seed=4)
    assert given.resolved(SAMPLED) == given
    assert given.from_folder(SAMPLED) == {}  # what filters would keep a greedy request does not ask
    warm = SamplingParams(temperature=0.3)
    assert warm.from_folder(SAMPLED) == {"top_p": 0.9, "repetition_penalty": 1.05, "min_tokens": 3}
    once = SamplingParams().resolved(SAMPLED)
    assert once.resolved(GenerationDefaults(do_sample=True, temperature=2.0)) == once


@pytest.mark.parametrize(
    ("defaults", "temperature"),
    [
        (GenerationDefaults(), 0.0),
        (GenerationDefaults(temperature=0.6), 0.0),
        (GenerationDefaults(do_sample=False, temperature=0.6), 0.0),
        (GenerationDefaults(do_sample=True), 1.0),
        (GenerationDefaults(do_sample=True, temperature=0.6), 0.6),
        (GenerationDefaults(do_sample=True, temperature=1e-6), 0.0),
    ],
)
def test_the_folders_temperature(defaults, temperature):
    assert SamplingParams().resolved(defaults).temperature == temperature


@pytest.mark.parametrize(
    "said",
    [{"repetition_penalty": 0.0}, {"presence_penalty": 3.0}, {"do_sample": True, "temperature": -1.0}]
    + [{"do_sample": True, "top_p": 1.5}, {"min_new_tokens": -1}],
)
def test_a_folder_out_of_range_is_named(said):
    with pytest.raises(ValueError, match=r"^/models/x/generation_config.json: \w+ must be "):
        SamplingParams().resolved(GenerationDefaults(**said, source=Path("/models/x/generation_config.json")))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.fixed_dictionaries({}, optional={"temperature": st.floats(0, 2), "top_p": st.floats(0.1, 1)}),
    st.fixed_dictionaries({}, optional={"top_k": st.integers(0, 9), "min_tokens": st.integers(0, 9)}),
    st.builds(
        GenerationDefaults,
        do_sample=st.sampled_from([None, True, False]),
        temperature=st.one_of(st.none(), st.floats(0, 2)),
        top_p=st.one_of(st.none(), st.floats(0.1, 1)),
        top_k=st.one_of(st.none(), st.integers(0, 9)),
        min_new_tokens=st.one_of(st.none(), st.integers(0, 9)),
    ),
)
def test_what_is_given_wins(sampling, others, defaults):
    asked = SamplingParams(**sampling, **others)
    resolved = asked.resolved(defaults)
    assert all(getattr(resolved, name) == getattr(asked, name) for name in (sampling | others))
    greedy = resolved.temperature == 0
    names = {"top_p": "top_p", "top_k": "top_k", "min_new_tokens": "min_tokens"}
    for said, name in names.items():
        value = getattr(defaults, said)
        if name not in sampling | others and value is not None and not (greedy and name != "min_tokens"):
            assert getattr(resolved, name) == value


def test_defaults_are_greedy_and_values_are_normalised():
    params = SamplingParams(stop="\n\n", stop_token_ids=[np.int64(2), 7], top_k=np.int32(4), seed=2**32 - 1)
    assert params.stop == ("\n\n",) and params.stop_token_ids == (2, 7) and params.top_k == 4
    assert SamplingParams().temperature == 0 and SamplingParams(temperature=1e-9).temperature == 0
    batch = BatchSampling.from_params([params, SamplingParams(temperature=0.5)])
    assert [leaf.dtype.name for leaf in jax.tree.leaves(batch)] == ["float32", "float32", "int32", "float32", "uint32"]
    assert batch.seed.tolist() == [2**32 - 1, 0] and batch.temperature.tolist() == [0.0, 0.5]


def test_a_batch_needs_a_row():
    with pytest.raises(ValueError, match="at least one SamplingParams"):
        BatchSampling.from_params([])
