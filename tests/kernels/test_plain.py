"""Many queries, taken in blocks, get what they get at once; scores are scaled in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.cache import LayerKV
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.plain import LONG, attend, attend_block
from jaxspec.kernels.segments import ROOMY, Scores, Segment, merged


def draws(seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng, lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))


def at_once(query, segments):
    return attend_block(query, jnp.arange(query.shape[2]), merged(segments), Scores())


def gradients(function):
    """Of the sum of squares, by query, keys and values."""

    def loss(query, kv, mask):
        return (function(query, [Segment(kv, mask)]) ** 2).sum()

    return lambda query, segments: jax.grad(loss, (0, 1))(query, *segments[0])


@pytest.mark.parametrize("queries_of_masks", [("each", "each"), ("one", "each"), ("one", "one")])
def test_blocks_of_queries_equal_all_at_once(queries_of_masks):
    rng, normal = draws()
    query = normal(2, 4, LONG, 8)

    def segment(length, kind):
        queries = LONG if kind == "each" else 1
        mask = jnp.asarray(rng.random((2, queries, length)) < 0.5).at[..., 0].set(True)
        return Segment(LayerKV(normal(2, 2, length, 8), normal(2, 2, length, 8)), Mask(dense=mask))

    segments = [segment(length, kind) for length, kind in zip((96, 40), queries_of_masks, strict=True)]
    np.testing.assert_allclose(attend(query, segments), at_once(query, segments), rtol=1e-5, atol=1e-6)
    by_query = [jax.grad(lambda q, f=f: (f(q, segments) ** 2).sum())(query) for f in (attend, at_once)]
    np.testing.assert_allclose(*by_query, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [LONG - 1, 4 * LONG - 56, 4 * LONG, 4 * LONG + 1])
def test_no_length_switches_blocks_off(length):
    """The last block is padded; a compiled program never holds the scores of all queries, nor does its gradient."""
    _, normal = draws()
    query, kv = normal(1, 2, length, 4), LayerKV(normal(1, 2, length, 4), normal(1, 2, length, 4))
    segments = [Segment(kv, Mask(causal=True))]
    scores = 4 * 2 * length**2
    for function in (lambda f: f, gradients):
        compiled = jax.jit(function(attend)).lower(query, segments).compile()
        ours, expected = compiled(query, segments), jax.jit(function(at_once))(query, segments)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert (compiled.memory_analysis().temp_size_in_bytes < scores) == (length >= LONG)


def test_scores_are_scaled_in_float32():
    """A bfloat16 query is not rounded once more by the scale."""
    _, normal = draws()
    query, *kv = (normal(1, 2, length, 8).astype(jnp.bfloat16) for length in (3, 9, 9))
    out = attend(query, [Segment(LayerKV(*kv), Mask())], Scores(scale=0.3))
    query, keys, values = (np.asarray(x, np.float32) for x in (query, *kv))
    weights = jax.nn.softmax(0.3 * query @ keys.swapaxes(2, 3), axis=-1).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(weights, np.float32) @ values, atol=0.02)
    default = attend(jnp.asarray(query), [Segment(LayerKV(*map(jnp.asarray, (keys, values))), Mask())])
    expected = jax.nn.softmax(query @ keys.swapaxes(2, 3) / 8**0.5, axis=-1) @ values
    np.testing.assert_allclose(default, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize(("capacity", "queries"), [(ROOMY, 1), (ROOMY + 88, 8), (2 * ROOMY, LONG - 1)])
def test_a_roomy_cache_is_read_as_far_as_it_is_filled(capacity, queries, window):
    """It equals reading all of it; and what a row gets is the same to the last bit whatever others have filled."""
    rng, normal = draws()
    query, lengths = normal(3, 4, queries, 8), jnp.array([0, 130, capacity - 3])
    kv = LayerKV(normal(3, 2, capacity, 8), normal(3, 2, capacity, 8))
    own = LayerKV(normal(3, 2, queries, 8), normal(3, 2, queries, 8))
    places = lengths[:, None] + jnp.arange(queries)

    def segments(lengths):
        cache = Mask(lengths, None if window is None else places, window=window)
        return [Segment(kv, cache), Segment(own, Mask(jnp.array([queries, 1, 0]), causal=True))]

    one, other = jax.jit(attend)(query, segments(lengths)), at_once(query, segments(lengths))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(attend)(query, segments(lengths.at[2].set(0)))[:2], one[:2])


def test_what_is_not_filled_is_not_read_on_a_cpu():
    """The loop over parts of the cache ends where the longest row does."""
    _, normal = draws()
    kv, own = LayerKV(*[normal(1, 1, ROOMY, 4)] * 2), LayerKV(*[normal(1, 1, 1, 4)] * 2)
    poisoned = jax.tree.map(lambda x: x.at[:, :, 128:].set(jnp.nan), kv)
    for cache in (kv, poisoned):
        out = attend(normal(1, 1, 1, 4), [Segment(cache, Mask(jnp.array([128]))), Segment(own, Mask())])
        assert np.isfinite(out).all()
