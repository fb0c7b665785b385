"""A cache holds what was appended to it, row by row, and nothing is copied where it grows in a compiled loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.cache import Cache, LayerKV, take

BATCH, HEADS, CAPACITY, WIDTH, NEW = 3, 2, 12, 4, 5
append = jax.jit(Cache.append)


def new_kv(rng: np.random.Generator, length: int, layers: int = 2) -> tuple[LayerKV, ...]:
    def draw():
        return jnp.asarray(rng.normal(size=(BATCH, HEADS, length, WIDTH)), jnp.float32)

    return tuple(LayerKV(draw(), draw()) for _ in range(layers))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(0, NEW), min_size=BATCH, max_size=BATCH), max_size=5), st.booleans(), st.data())
def test_keys_and_values_stand_where_they_were_appended(counts, picked, data):
    """Against lists per row; what falls past the capacity is dropped."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    prompt = new_kv(rng, 4)
    lengths = np.array([4, 0, 2])
    cache = Cache.of_prompt(prompt, jnp.asarray(lengths), CAPACITY)
    assert cache.capacity == CAPACITY
    flat = [np.asarray(part) for kv in prompt for part in kv]
    expected = [[[part[row, :, i] for i in range(lengths[row])] for row in range(BATCH)] for part in flat]
    for count in counts:
        new = new_kv(rng, NEW)
        path = rng.integers(0, NEW, (BATCH, NEW)) if picked else np.tile(np.arange(NEW), (BATCH, 1))
        cache = append(cache, take(new, jnp.asarray(path)) if picked else new, jnp.asarray(count))
        for lists, part in zip(expected, (np.asarray(part) for kv in new for part in kv), strict=True):
            for row in range(BATCH):
                lists[row] += [part[row, :, node] for node in path[row, : count[row]]]
    np.testing.assert_array_equal(cache.lengths, [len(each) for each in expected[0]])
    for part, lists in zip((part for kv in cache.layers for part in kv), expected, strict=True):
        for row in range(BATCH):
            kept = lists[row][:CAPACITY]
            if kept:
                np.testing.assert_array_equal(part[row, :, : len(kept)], np.stack(kept, axis=1))


def test_empty_caches_fill_like_those_of_prompts():
    new = new_kv(np.random.default_rng(0), NEW)
    count = jnp.array([5, 1, 3])
    grown = Cache.empty(2, BATCH, HEADS, CAPACITY, WIDTH, jnp.bfloat16).append(new, count)
    assert {part.dtype for kv in grown.layers for part in kv} == {jnp.dtype(jnp.bfloat16)}
    made = Cache.of_prompt(new, count, CAPACITY)
    np.testing.assert_array_equal(grown.lengths, made.lengths)
    for part, other in zip(jax.tree.leaves(grown.layers), jax.tree.leaves(made.layers), strict=True):
        for row, used in enumerate(count):
            np.testing.assert_array_equal(part[row, :, :used], other[row, :, :used].astype(jnp.bfloat16))
    jax.jit(lambda cache: cache.append(new, count), donate_argnums=0)(Cache.empty(2, BATCH, HEADS, CAPACITY, WIDTH))


def test_a_prompt_must_fit():
    with pytest.raises(ValueError, match="a prompt of 13 positions does not fit a cache of 12"):
        Cache.of_prompt(new_kv(np.random.default_rng(0), 13), jnp.array([13, 1, 1]), CAPACITY)


def test_no_cache_is_copied_in_a_loop():
    """The count follows from what was computed with the cache."""
    capacity = 4096

    def grow(cache):
        def body(carry):
            step, cache = carry
            keys = cache.layers[0].keys
            read = jnp.einsum("bhsd,d->bhs", keys, jnp.arange(WIDTH, dtype=keys.dtype)).max(axis=(1, 2))  # [B]
            new = jnp.broadcast_to(read[:, None, None, None], (BATCH, HEADS, NEW, WIDTH))
            count = jnp.where(read > step, 1, 2)
            return step + 1, cache.append([LayerKV(new, new)], count)

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, cache))[1]

    cache = jax.eval_shape(lambda: Cache.empty(1, BATCH, HEADS, capacity, WIDTH))
    text = jax.jit(grow, donate_argnums=0).lower(cache).compile().as_text()
    shape = rf"f32\[{BATCH},{HEADS},{capacity},{WIDTH}\]"
    assert re.search(rf"= {shape}", text) and not re.search(rf"= {shape}\S* copy\(", text)
