"""What an engine keeps: bounded in bytes, the latest used longest; prefixes are right in every family."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxspec import Generator, SamplingParams
from jaxspec.prompting import encode_prompt
from jaxspec.serving.caches import ByteCache, common_length, content_of
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import EngineSettings
from tests.families import FAMILIES, family_target


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=40))
def test_a_cache_is_a_plain_one_within_its_bytes(puts):
    cache, plain = ByteCache(12), {}
    for key, size in puts:
        found = cache.get(key)
        assert (None if found is None else found) == (plain[key][0] if key in plain else None)
        if key in plain:
            plain[key] = plain.pop(key)
        cache.put(key, (key, size), size)
        plain.pop(key, None)
        plain[key] = (key, size), size
        while sum(each[1] for each in plain.values()) > 12:
            plain.pop(next(iter(plain)))
        assert cache.keys() == [*plain]
        use = cache.use()
        assert use.bytes == sum(each[1] for each in plain.values()) <= use.limit and use.entries == len(plain)
    assert cache.use().hits + cache.use().misses == len(puts)


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = ByteCache(4)
    cache.put("small", 1, 3)
    cache.put("large", 2, 5)
    assert cache.keys() == ["small"]
    assert ByteCache(0).get("anything") is None


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length(one, other):
    length = common_length(np.array(one, np.int64), np.array(other, np.int64))
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_begin_alike_go_on_from_what_was_read(name):
    """Also where the next image is another one, and where an image must be read whole."""
    target, rng = family_target(name), np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(3)]
    sees = bool(target.adapter.image_token_ids)

    def prompt(numbers, question):
        parts = [{"type": "image", "image": pictures[number]} for number in numbers] if sees else []
        words = {"type": "text", "text": f"Look at them closely and carefully, please. {question}"}
        return encode_prompt(target, [{"role": "user", "content": [*parts, words]}])

    prompts = [prompt([0, 1], "What?"), prompt([0, 1], "Where is it?"), prompt([0, 2], "What?"), prompt([0], "Who?")]
    contents = [content_of(target.adapter, each) for each in prompts]
    assert common_length(contents[0], contents[1]) > common_length(contents[0], contents[2]) or not sees
    alone = Generator(target, max_length=512)
    chosen = EngineSettings(max_length=512, max_num_seqs=2, warm_up=False, prefill_chunk=64)
    with Engine(target, settings=chosen) as engine:
        cached = []
        for number, each in enumerate(prompts * 2):
            sampling = SamplingParams(temperature=float(number % 2), seed=number)
            stream = engine.submit(each, sampling, 6)
            assert stream.result().tokens.tolist() == alone.generate_encoded([each], sampling, 6)[0].tokens.tolist()
            cached.append(stream.served.cached_tokens)
        assert cached[0] == 0 and cached[1] > 16
        assert [number > 0 for number in cached[4:]] == [True] * 4
