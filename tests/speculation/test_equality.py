"""Speculative decoding equals autoregressive decoding token by token, whatever drafter, tree, sampling and batch."""

import functools

import numpy as np
import pytest

from jaxspec import SamplingParams
from jaxspec.metrics import Acceptance
from tests.drafting import DRAFTERS

NEW_TOKENS = (32, 24, 29)
TEMPERATURES = (0.0, 0.7, 1.0)
FILTERS = {"unfiltered": {}, "top_p": {"top_p": 0.9}, "top_k": {"top_k": 20}, "min_p": {"min_p": 0.05}}
SETTINGS = {
    f"{temperature}-{name}": {"temperature": temperature, **options}
    for temperature in TEMPERATURES
    for name, options in FILTERS.items()
}
everywhere = pytest.mark.combinations(name=DRAFTERS, temperature=TEMPERATURES, filters=FILTERS, batch=(1, 3))


@pytest.fixture(scope="module")
def answers(generators, requests):
    """Results of the three requests, with seeds 11, 12, 13: together, or the one with an image alone."""

    @functools.cache
    def run(name: str, setting: str, batch: int, first_seed: int = 11):
        rows = range(3) if batch == 3 else [1]
        return generators(name).generate_batch(
            [requests[row][0] for row in rows],
            [requests[row][1] for row in rows],
            [SamplingParams(**SETTINGS[setting], seed=first_seed + row) for row in rows],
            [NEW_TOKENS[row] for row in rows],
        )

    return run


def tokens_of(results):
    return [result.tokens.tolist() for result in results]


@everywhere
def test_speculative_equals_autoregressive(answers, name, temperature, filters, batch):
    setting = f"{temperature}-{filters}"
    expected, results = answers("autoregressive", setting, batch), answers(name, setting, batch)
    assert tokens_of(results) == tokens_of(expected)
    assert [result.text for result in results] == [result.text for result in expected]
    assert [result.finish_reason for result in results] == [result.finish_reason for result in expected]


@pytest.mark.parametrize(
    "name, least",
    [
        ("eagle2", 1.5),
        ("vispec", 1.2),
        ("eaglevlm", 1.5),
        ("specvlm", 1.2),
        ("chain", 1.5),
        ("massv", 1.5),
        ("text_lm", 1.2),
        ("self", 2.0),
        ("medusa", 1.05),
    ],
)
def test_drafts_are_accepted_at_every_temperature(answers, name, least):
    """Without this, the equalities above might be shown on rejections only."""
    for temperature in TEMPERATURES:
        settings = [f"{temperature}-{filters}" for filters in ("unfiltered", "top_p")]
        results = [result for setting in settings for result in answers(name, setting, 3)]
        emitted = sum(result.stats.emitted_tokens for result in results)
        rounds = sum(result.stats.rounds for result in results)
        assert emitted / rounds > least, temperature


@pytest.mark.parametrize("setting", ["0.0-unfiltered", "1.0-top_p"])
@pytest.mark.parametrize("name", [*DRAFTERS, "autoregressive"])
def test_row_equals_the_request_alone(answers, name, setting):
    alone, together = answers(name, setting, 1)[0], answers(name, setting, 3)[1]
    assert alone.tokens.tolist() == together.tokens.tolist()
    assert alone.accepted.tolist() == together.accepted.tolist()
    assert alone.text == together.text
    assert alone.stats.rounds == together.stats.rounds


@everywhere
def test_accepted_flags_tell_the_rounds(answers, generators, name, temperature, filters, batch):
    """The first token comes from the prefill; each round then emits accepted tokens and one of the target's own, but
    for a last round that the token limit cut among its accepted ones."""
    for arm in (name, "autoregressive"):
        width = generators(arm).tree.max_depth + 1
        for result in answers(arm, f"{temperature}-{filters}", batch):
            check_flags(result, width)


def check_flags(result, width: int) -> None:
    assert len(result.accepted) == len(result.tokens) == result.stats.generated_tokens
    assert not result.accepted[0]
    flags = result.accepted[1:]
    cut = bool(result.accepted[-1])
    assert result.stats.emitted_tokens == len(flags)
    assert flags.sum() == len(flags) - result.stats.rounds + cut
    ends = np.flatnonzero(~flags) + 1
    if cut:
        ends = np.append(ends, len(flags))
    lengths = np.diff(ends, prepend=0)
    told = Acceptance.from_histogram(np.bincount(lengths - 1, minlength=width))
    assert told.rounds == result.stats.rounds
    assert told.acceptance_at_position == result.stats.acceptance_at_position
    assert told.mean_acceptance_length == result.stats.mean_acceptance_length


@pytest.mark.parametrize("name", ["autoregressive", "self"])
def test_seed_decides_what_is_sampled(answers, generators, requests, name):
    first, other = (answers(name, "1.0-unfiltered", 3, seed) for seed in (11, 51))
    assert all(a != b for a, b in zip(tokens_of(first), tokens_of(other), strict=True))
    prompts, images = zip(*requests, strict=True)
    again = generators(name).generate_batch(
        prompts, images, [SamplingParams(temperature=1.0, seed=seed) for seed in (11, 12, 13)], NEW_TOKENS
    )
    assert tokens_of(again) == tokens_of(first)


def test_rows_of_a_batch_have_their_own_sampling(answers, generators, requests):
    settings = ["0.0-unfiltered", "0.7-top_k", "1.0-top_p"]
    prompts, images = zip(*requests, strict=True)
    sampling = [SamplingParams(**SETTINGS[setting], seed=11 + row) for row, setting in enumerate(settings)]
    mixed = generators("self").generate_batch(prompts, images, sampling, NEW_TOKENS)
    expected = [answers("autoregressive", setting, 3)[row] for row, setting in enumerate(settings)]
    assert tokens_of(mixed) == tokens_of(expected)


def test_answers_are_worth_comparing(answers):
    """They are long, not constant, and follow prompt, temperature and filter."""
    for setting in SETTINGS:
        for result in answers("autoregressive", setting, 3):
            assert len(set(result.tokens.tolist())) > 4
    everything = [tuple(tokens) for setting in SETTINGS for tokens in tokens_of(answers("autoregressive", setting, 3))]
    assert len(set(everything)) >= 15
