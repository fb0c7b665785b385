"""Every way in which SpecVLM's head may see images: the tokens of autoregressive decoding, and drafts that help.

How its gate chooses among them (mode "select") is part of the matrix in test_equality.py.
"""

import functools

import numpy as np
import pytest

from jaxspec import Generator, SamplingParams
from jaxspec.drafters.compressor import MODES
from jaxspec.drafters.drafter import Drafter
from tests.drafting import TREE, linked_head

NEW_TOKENS = (24, 18, 21)


@pytest.fixture(scope="module")
def answers(target, requests):
    """Results of the three requests together, by mode and temperature; None is autoregressive decoding."""
    prompts, images = zip(*requests, strict=True)

    @functools.cache
    def generator(mode: str | None) -> Generator:
        drafter = None if mode is None else Drafter(linked_head(target, mode), TREE, "specvlm", {})
        return Generator(target, drafter, max_length=512)

    @functools.cache
    def run(mode: str | None, temperature: float) -> list:
        sampling = [SamplingParams(temperature, seed=11 + row) for row in range(3)]
        return generator(mode).generate_batch(list(prompts), list(images), sampling, list(NEW_TOKENS))

    return run


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "select"])
def test_speculative_equals_autoregressive(answers, mode, temperature):
    results = answers(mode, temperature)
    for expected, result in zip(answers(None, temperature), results, strict=True):
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
    emitted, rounds = (sum(getattr(each.stats, name) for each in results) for name in ("emitted_tokens", "rounds"))
    assert emitted / rounds > 1.2
