"""Prompts read in chunks, or on from where an earlier one has been read, are as if they had been read at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.programs import Programs
from jaxspec.prompting import encode_prompt
from jaxspec.speculation import prefill
from jaxspec.speculation.state import Request
from tests.drafting import DRAFTERS, random_head
from tests.families import FAMILIES
from tests.speculation.test_families import OTHERS, VISION, answers, generator, requests, targets

CAPACITY, CHUNK = 256, 16


def encoded(family: str) -> list:
    return [encode_prompt(targets(family), question * 4, images) for question, images in requests(family)]


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_make_what_one_pass_makes(family):
    """Keys, values and all that a drafter reads; a prompt of one chunk stands beside longer ones."""
    model, adapter, prompts = targets(family).model, targets(family).adapter, encoded(family)
    head = random_head(targets(family), "eagle2")
    whole, chunked = (Programs(model, adapter, head, TreeConfig(1, 2, 4), chunk) for chunk in (512, CHUNK))
    params = whole.params_of(model, head)
    expected, read = (each.read(params, prompts, CAPACITY) for each in (whole, chunked))
    assert whole.traced.count("read_chunk") == 1 and "with_room" in chunked.traced
    np.testing.assert_array_equal(read.cache.lengths, [len(prompt.input_ids) for prompt in prompts])
    np.testing.assert_allclose(read.last, expected.last, rtol=1e-4, atol=1e-4)
    for row, prompt in enumerate(prompts):
        size = len(prompt.input_ids)
        for kv, same in zip(read.cache.layers, expected.cache.layers, strict=True):
            for part, other in zip(kv, same, strict=True):
                np.testing.assert_allclose(part[row, :, :size], other[row, :, :size], rtol=1e-4, atol=1e-4)
        for part, other in zip(jax.tree.leaves(read.inputs), jax.tree.leaves(expected.inputs), strict=True):
            np.testing.assert_allclose(part[row, :size], other[row, :size], rtol=1e-4, atol=1e-4)


@pytest.mark.combinations(family=VISION, name=["eagle2", "vispec", *OTHERS])
def test_answers_of_chunked_prompts(family, name):
    """Those of one pass: what a drafter needs of the whole prompt it gets."""
    drafter = generator(family, name).drafter
    chunked = Generator(targets(family), drafter, max_length=512, prefill_chunk=CHUNK)
    prompts, images = zip(*requests(family), strict=True)
    for temperature in (0.0, 1.0):
        sampling = [SamplingParams(temperature, seed=row) for row in range(3)]
        results = chunked.generate_batch(list(prompts), list(images), sampling, [20, 14, 17])
        whole = answers(family, name, 3, temperature)
        for result, expected in zip(results, whole, strict=True):
            np.testing.assert_array_equal(result.tokens, expected.tokens)
            np.testing.assert_array_equal(result.accepted, expected.accepted)


@pytest.mark.parametrize("name", [*DRAFTERS, "autoregressive"])
def test_a_prompt_goes_on_from_one_that_begins_alike(target, generators, pictures, name):
    """The first one has other text behind its image, and is longer."""
    generator = generators(name)
    programs, params = generator.programs, generator._params
    questions = "How many shapes are there, and of what colour is each of them?", "Where?"
    first, second = (encode_prompt(target, question, pictures[:1]) for question in questions)
    alike = int(np.cumprod(first.input_ids[: len(second.input_ids)] == second.input_ids[: len(first.input_ids)]).sum())
    assert target.adapter.is_image(second.input_ids[:alike]).any() and alike < len(second.input_ids)
    sampling = SamplingParams(temperature=1.0, seed=5)
    read = programs.read(params, [first], 192)
    read = prefill.rewind(read, jnp.array([alike], jnp.int32))
    read = programs.read(params, [second], 192, past=read, starts=[alike])
    request = Request.of([sampling], [second.input_ids], [24], target.stop_token_ids, target.model.vocab_size)
    state = programs.decode(params, programs.begin(params, read, request, [second], 192), jnp.int32(100))
    result = generator.generate_encoded([second], sampling, 24)[0]
    count = int(state.counts[0])
    assert np.asarray(state.tokens)[0, :count].tolist() == result.tokens.tolist()
    assert np.asarray(state.from_draft)[0, :count].tolist() == result.accepted.tolist()


def test_a_known_image_is_not_encoded_again(target, generators, pictures, monkeypatch):
    programs, params = generators("massv").programs, generators("massv")._params
    prompt = encode_prompt(target, "Compare the two.", [pictures[0], pictures[1], pictures[0]])
    encoded, encode = [], programs.encode

    def counted(params, layout):
        encoded.append(layout.key)
        return encode(params, layout)

    monkeypatch.setattr(programs, "encode", counted)
    expected = programs.read(params, [prompt, prompt], CAPACITY)
    assert sorted(encoded) == sorted({layout.key for layout in prompt.images}) and len(encoded) == 2
    tables = {layout.key: encode(params, layout) for layout in prompt.images}
    read = programs.read(params, [prompt, prompt], CAPACITY, tables)
    assert len(encoded) == 2
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_an_earlier_prompt_left_is_not_seen(target, generators, pictures):
    """An image that stood behind the new prompt's end is no image of the new prompt."""
    generator = generators("vispec")
    programs, params = generator.programs, generator._params
    long = encode_prompt(target, "~" * 30, pictures[:2])
    short = dataclasses.replace(encode_prompt(target, "~" * 3, ()))
    common = int(np.cumprod(long.input_ids[: len(short.input_ids)] == short.input_ids).sum())
    read = programs.read(params, [long], CAPACITY)
    read = programs.read(params, [short], CAPACITY, past=prefill.rewind(read, jnp.array([common])), starts=[common])
    context = prefill.context_of(read, jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.int32), 2)
    assert (np.asarray(context.image_ids) == -1).all() and context.lengths.tolist() == [len(short.input_ids)]


@pytest.mark.parametrize("chunk", [8, 18, 0, 2.5, "64"])
def test_sizes_of_chunks_that_cannot_be(target, chunk):
    with pytest.raises(ValueError, match="prefill_chunk must be"):
        Generator(target, prefill_chunk=chunk)


def test_prompts_that_cannot_be_read(target, generators):
    """Where a cache is too small something would be lost without a word; and the last token must be read."""
    programs, params = generators("eagle2").programs, generators("eagle2")._params
    prompt = encode_prompt(target, "~" * 80)
    length = len(prompt.input_ids)
    with pytest.raises(ValueError, match=f"prompt 0 has {length} tokens, the caches have 64 positions"):
        programs.read(params, [prompt], 64)
    read = programs.read(params, [prompt], 128)
    with pytest.raises(ValueError, match=f"cannot be read on from token {length}"):
        programs.read(params, [prompt], 128, past=read, starts=[length])
    request = Request.of([SamplingParams()], [prompt.input_ids], [129 - length], (), target.model.vocab_size)
    with pytest.raises(ValueError, match=f"may have {129 - length} new ones, the caches have 128 positions"):
        programs.begin(params, read, request, [prompt], 128)
