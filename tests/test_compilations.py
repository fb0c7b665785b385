"""What is compiled: programs per size of prompt and of cache, nothing for another length or another sampling."""

import collections
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
def test_programs_per_size(target, name):
    generator = Generator(target, None if name == "autoregressive" else DRAFTERS[name](target), max_length=512)
    assert generator.compilations == 0
    for tokens in range(2, 60, 4):
        ask(generator, tokens)
    assert generator.programs.traced == ["no_images", "read_chunk", "begin", "decode"]
    for tokens in (60, 3, 33):  # the edges of the size, and limits of the same size
        ask(generator, tokens, max_new_tokens=64 - tokens)
    assert generator.compilations == 4
    for tokens in (61, 64):  # the same chunk, a larger cache
        ask(generator, tokens)
    assert generator.programs.traced[4:] == ["begin", "decode"]
    for tokens in (65, 80, 90):  # a larger chunk, too
        ask(generator, tokens)
    assert generator.programs.traced[6:] == ["read_chunk", "begin"]
    for tokens in (10, 30):  # a cache that has been seen with another chunk: decoding does not ask how long a prompt is
        ask(generator, tokens, max_new_tokens=66)
    assert generator.compilations == 8


def test_programs_add_up(target, pictures):
    """Images of every number go through one tower program, and nothing depends on how many tokens are asked for."""
    generator = Generator(target, DRAFTERS["vispec"](target), max_length=512)

    def requests(limits):
        for limit, images in itertools.product(limits, ((), pictures[:1], pictures[1:])):
            generator.generate("<image>" * len(images) + "~" * 5, images, next(SAMPLINGS), limit, raw=True)

    requests((30,))
    kinds = collections.Counter(generator.programs.traced)
    assert kinds["encode_image"] == kinds["place"] == 1 and kinds["read_chunk"] == 2 and kinds["decode"] <= 3, kinds
    before = generator.compilations
    requests((25, 27, 31))
    assert generator.compilations == before


def test_long_prompts_of_all_lengths_share_three_chunks(target):
    generator = Generator(target, DRAFTERS["chain"](target), max_length=1024, prefill_chunk=64)
    for tokens in range(100, 500, 23):
        ask(generator, tokens, max_new_tokens=max(1, 512 - tokens))
    kinds = collections.Counter(generator.programs.traced)
    # The first chunk has nothing behind it.
    assert kinds == {"no_images": 1, "read_chunk": 1 + 3, "with_room": 1, "begin": 1, "decode": 1}


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
