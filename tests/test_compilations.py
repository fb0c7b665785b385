"""What is compiled: one prefill and one decode per shape bucket, nothing for another length or another sampling."""

import itertools

import pytest

from jaxspec import Generator, SamplingParams
from tests.drafting import DRAFTERS

SAMPLINGS = itertools.cycle(
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, stop_token_ids=(7,)),
        SamplingParams(temperature=1.3, top_k=20, min_p=0.1, stop="zz"),
    ]
)


def ask(generator, tokens, max_new_tokens=4):
    """A prompt of so many tokens."""
    result = generator.generate("~" * (tokens - 1), (), next(SAMPLINGS), max_new_tokens, raw=True)
    assert result.stats.prompt_tokens == tokens


@pytest.mark.parametrize("name", ["autoregressive", "chain"])
def test_two_programs_per_bucket(target, name):
    generator = Generator(target, None if name == "autoregressive" else DRAFTERS[name](target), max_length=512)
    assert generator.compilations == 0
    for tokens in range(2, 42, 2):
        ask(generator, tokens)
    assert generator.compilations == 2
    for tokens in (64, 3, 33):  # the edges of the bucket, and limits of the same bucket
        ask(generator, tokens, max_new_tokens=tokens)
    assert generator.compilations == 2
    for index, bucket in enumerate((65, 97) if name == "autoregressive" else (65,), start=2):
        for tokens in (bucket, bucket + 1, bucket + 30):
            ask(generator, tokens)
        assert generator.compilations == 2 * index


def test_slices_share_the_program(generators):
    generator = generators("autoregressive")
    counts = []
    for rounds in (1, 2, 7, 1000):
        list(generator.stream("~" * 20, (), SamplingParams(), 8, raw=True, rounds_per_piece=rounds))
        counts.append(generator.compilations)
    assert counts == counts[:1] * 4


def test_other_parameters_in_the_drafter_share_the_programs(target, generators):
    question, limit = ("How many shapes are there?", ()), {"max_new_tokens": 12}
    generator, fresh = generators("eagle2"), generators("random")
    before, expected = (each.generate(*question, **limit).stats.emitted for each in (generator, fresh))
    compiled = generator.compilations
    shared = generator.with_drafter(DRAFTERS["random"](target))
    assert shared.generate(*question, **limit).stats.emitted == expected != before
    assert generator.generate(*question, **limit).stats.emitted == before
    assert shared.compilations == generator.compilations == compiled
    with pytest.raises(ValueError, match="needs a drafter of the same method and config, got a vispec one"):
        generator.with_drafter(DRAFTERS["vispec"](target))
