"""A prompt that is read in chunks, each over the cache of those before, is what it is read at once, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.cache import Cache
from jaxspec.prompting import encode_prompt
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.reading import read_prompts
from tests.families import FAMILIES, family_target
from tests.folders import relative_error

CHUNK = 16
TOLERANCE = 1e-5


def cuts(image_ids: np.ndarray, length: int, whole_images: bool, rng: np.random.Generator) -> list[int]:
    """How many tokens of a prompt each chunk reads: fewer than there is room for at times, and where `whole_images` is
    asked for no image is cut."""
    counts, at = [], 0
    while at < length:
        stop = min(at + int(rng.integers(CHUNK // 2, CHUNK + 1)), length)
        while whole_images and stop < length and image_ids[stop] >= 0 and image_ids[stop] == image_ids[stop - 1]:
            stop -= 1
        counts.append(stop - at)
        at = stop
    return counts


@jax.jit
def read_next(model, embeds, count, image_ids, position_ids, cache):
    features, new_kv = model.prefill(embeds, count, image_ids, position_ids, (1,), cache)
    return features, cache.append(new_kv, count)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_are_the_whole(name):
    """Ragged rows, cut at places of their own; local layers see 6 tokens back, less than a chunk."""
    target, rng = family_target(name), np.random.default_rng(3)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (130, 90, 3), (16, 16, 3))]
    own = ((), pictures[:1], pictures[1:]) if target.adapter.image_token_ids else ((), (), ())
    questions = ("How many shapes are there, and where is the largest?", "What?", "Compare the two, please.")
    prompts = [encode_prompt(target, *each) for each in zip(questions, own, strict=True)]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    batch = stack_prompts(target.adapter, prompts, longest + 3)
    features, new_kv, embeds, _ = jax.jit(read_prompts, static_argnums=2)(target.model, batch, (1,))
    model, text = target.model, target.config.text

    plans = [
        cuts(batch.image_ids[row], length, model.config.reads_images_whole, rng)
        for row, length in enumerate(batch.lengths.tolist())
    ]
    rounds = max(map(len, plans))
    counts = np.array([plan + [0] * (rounds - len(plan)) for plan in plans], np.int32)  # [B, rounds]
    assert rounds > 2 and (counts == 0).any()
    cache = Cache.empty(text.num_layers, 3, text.num_kv_heads, longest, text.head_dim)
    read = np.zeros_like(features)
    for count, before in zip(counts.T, (np.cumsum(counts, axis=1) - counts).T, strict=True):
        places = np.minimum(before[:, None] + np.arange(CHUNK), longest + 2)  # [B, C]
        own_places = None
        if batch.position_ids is not None:
            own_places = np.take_along_axis(batch.position_ids, places[None], axis=2)
        chunk, cache = read_next(
            model,
            jnp.take_along_axis(embeds, places[..., None], axis=1),
            count,
            None if batch.images is None else np.take_along_axis(batch.images.ids, places, axis=1),
            own_places,
            cache,
        )
        for row in range(3):
            read[row, before[row] : before[row] + count[row]] = chunk[row, : count[row]]
    np.testing.assert_array_equal(cache.lengths, batch.lengths)
    for row, length in enumerate(batch.lengths):
        assert relative_error(read[row, :length], np.asarray(features[row, :length])) < TOLERANCE
        for layer, expected in zip(cache.layers, new_kv, strict=True):
            for part, whole in zip(layer, expected, strict=True):
                assert relative_error(part[row, :, :length], np.asarray(whole[row, :, :length])) < TOLERANCE


def test_a_cut_through_an_image_that_sees_itself_shows():
    """What the condition is for: half an image of Gemma3 cannot see the other half."""
    target = family_target("gemma3")
    embeds = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 32)), jnp.float32)
    ids = np.array([[-1, -1, 0, 0, 0, 0, -1, -1]])
    text = target.config.text
    empty = Cache.empty(text.num_layers, 1, text.num_kv_heads, 8, text.head_dim)
    whole, _ = read_next(target.model, embeds, np.array([8]), ids, None, empty)
    for stop, same in ((2, True), (6, True), (4, False)):
        _, cache = read_next(target.model, embeds, np.array([stop]), ids, None, empty)
        moved = (np.roll(x, -stop, axis=1) for x in (embeds, ids))
        rest, _ = read_next(target.model, next(moved), np.array([8 - stop]), next(moved), None, cache)
        rest = rest[:, : 8 - stop]
        assert (relative_error(rest, np.asarray(whole[:, stop:])) < TOLERANCE) == same
