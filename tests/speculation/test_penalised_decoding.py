"""Penalties and log-probabilities change nothing about speculation: the same tokens as autoregressive decoding, in
batches where some rows ask for them and some do not."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxspec import SamplingParams
from jaxspec.prompting import encode_prompt
from tests.plain_penalties import penalised_logits

ARMS = ("self", "eagle2", "vispec", "narrow", "massv", "lookup", "medusa")
LIMITS = (32, 24, 29)
PENALTIES = SamplingParams(
    repetition_penalty=1.3,
    presence_penalty=0.8,
    frequency_penalty=-0.6,
    logit_bias={5: 4.0, 9: -100, 70: 9.0},
    stop_token_ids=(70, 187),
    min_tokens=20,
    logprobs=3,
)
LOOSE = SamplingParams(temperature=0.7, seed=13)
SETTINGS = {
    "greedy": [PENALTIES, dataclasses.replace(PENALTIES, temperature=1.0, top_p=0.9, seed=12), LOOSE],
    "sampled": [
        dataclasses.replace(PENALTIES, temperature=1.0, seed=11, logprobs=None),
        SamplingParams(logprobs=0),
        SamplingParams(temperature=0.7, frequency_penalty=2.0, repetition_penalty=0.8, seed=13, logprobs=20),
    ],
}


@pytest.fixture(scope="module")
def answers(generators, requests):
    prompts, images = zip(*requests, strict=True)

    @functools.cache
    def run(name: str, setting: str):
        return generators(name).generate_batch(prompts, images, SETTINGS[setting], LIMITS)

    return run


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ARMS)
def test_speculative_equals_autoregressive(answers, name, setting):
    for ours, expected, params in zip(
        answers(name, setting), answers("autoregressive", setting), SETTINGS[setting], strict=True
    ):
        assert ours.tokens.tolist() == expected.tokens.tolist()
        assert (ours.text, ours.finish_reason) == (expected.text, expected.finish_reason)
        if params.logprobs is None:
            assert ours.logprobs is expected.logprobs is None
            continue
        for each in (ours, expected):
            assert each.logprobs.token_logprobs.shape == each.tokens.shape
            assert (
                each.logprobs.top_ids.shape == each.logprobs.top_logprobs.shape == (len(each.tokens), params.logprobs)
            )
        np.testing.assert_array_equal(ours.logprobs.top_ids, expected.logprobs.top_ids)
        for part in ("token_logprobs", "top_logprobs"):
            ours_part, expected_part = getattr(ours.logprobs, part), getattr(expected.logprobs, part)
            np.testing.assert_allclose(ours_part, expected_part, atol=1e-5)


def test_drafts_are_accepted(answers):
    for name, least in (("self", 1.7), ("eagle2", 1.5), ("massv", 1.3)):
        results = [result for setting in SETTINGS for result in answers(name, setting)]
        emitted = sum(result.stats.emitted_tokens for result in results)
        assert emitted / sum(result.stats.rounds for result in results) > least, name


def test_rows_that_ask_for_nothing_are_as_without(answers, generators, requests):
    prompts, images = zip(*requests, strict=True)
    alone = generators("eagle2").generate_batch(prompts, images, [LOOSE, SamplingParams(), LOOSE], LIMITS)
    assert answers("eagle2", "greedy")[2].tokens.tolist() == alone[2].tokens.tolist()
    assert answers("eagle2", "sampled")[1].tokens.tolist() == alone[1].tokens.tolist()
    assert alone[1].logprobs is None


def test_every_token_is_the_one_that_the_definitions_choose(answers, target, requests):
    """From the logits of one pass over the question and its answer; log-probabilities are those of the same logits."""
    result = answers("autoregressive", "greedy")[0]
    prompt = encode_prompt(target, *requests[0]).input_ids
    ids = np.concatenate([prompt, result.tokens])
    logits = np.asarray(target.logits({"input_ids": ids[None]}))[0, len(prompt) - 1 : -1]
    stops = [*target.stop_token_ids, *PENALTIES.stop_token_ids]
    for place, (own, token) in enumerate(zip(logits, result.tokens, strict=True)):
        scores = penalised_logits(own, PENALTIES, prompt, result.tokens[:place], stops)
        assert scores.argmax() == token
    assert (logits.argmax(-1) != result.tokens).any()
    assert result.finish_reason == "stop" and len(result.tokens) > PENALTIES.min_tokens
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(logprobs)), result.tokens]
    np.testing.assert_allclose(result.logprobs.token_logprobs, chosen, atol=1e-4)
    np.testing.assert_array_equal(result.logprobs.top_ids, np.argsort(-logprobs, axis=-1)[:, :3])
    np.testing.assert_allclose(result.logprobs.top_logprobs, -np.sort(-logprobs, axis=-1)[:, :3], atol=1e-4)


def test_a_bias_that_ends_the_answer(generators, target, requests):
    """At once, or as soon as min_tokens allows it; a stop token that is banned never comes."""
    (end,), (prompts, images) = target.stop_token_ids, zip(*requests, strict=True)
    favoured = SamplingParams(logit_bias={end: 100}, logprobs=0)
    rows = [favoured, dataclasses.replace(favoured, min_tokens=7), SamplingParams(logit_bias={end: -100}, logprobs=0)]
    for name in ("autoregressive", "self"):
        first, later, never = generators(name).generate_batch(prompts, images, rows, LIMITS)
        assert (first.tokens.tolist(), first.finish_reason) == ([end], "stop")
        assert (len(later.tokens), later.tokens[-1], later.finish_reason) == (8, end, "stop")
        assert end not in later.tokens[:-1] and end not in never.tokens


def test_pieces_carry_log_probabilities(generators, requests):
    generator = generators("chain")
    pieces = list(generator.stream(*requests[0], PENALTIES, 24, rounds_per_piece=2))
    result = pieces[-1].result
    assert len(pieces) > 3
    for part in ("token_logprobs", "top_ids", "top_logprobs"):
        joined = np.concatenate([getattr(piece.logprobs, part) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(result.logprobs, part))
    assert all(len(piece.logprobs.token_logprobs) == len(piece.tokens) for piece in pieces)
