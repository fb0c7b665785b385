"""Many queries, taken in blocks, get what they get at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.kernels.attention import LONG, LayerKV, Segment, attend, attend_block


@pytest.mark.parametrize("rows_of_masks", [("each", "each"), ("one", "each"), ("one", "one")])
def test_blocks_of_queries_equal_all_at_once(rows_of_masks):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    query = normal(2, 4, LONG, 8)

    def segment(length, kind):
        rows = LONG if kind == "each" else 1
        mask = jnp.asarray(rng.random((2, rows, length)) < 0.5).at[..., 0].set(True)
        return Segment(LayerKV(normal(2, 2, length, 8), normal(2, 2, length, 8)), mask)

    segments = [segment(length, kind) for length, kind in zip((96, 40), rows_of_masks, strict=True)]
    expected = attend_block(query, segments)
    np.testing.assert_allclose(attend(query, segments), expected, rtol=1e-5, atol=1e-6)
    gradients = [jax.grad(lambda q, f=f: (f(q, segments) ** 2).sum())(query) for f in (attend, attend_block)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [LONG - 1, LONG, LONG + 1, 2 * LONG - 56])
def test_no_length_switches_blocks_off(length):
    """The last block is padded; a compiled program never holds the scores of all queries."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    query, kv = normal(1, 2, length, 4), LayerKV(normal(1, 2, length, 4), normal(1, 2, length, 4))
    segments = [Segment(kv, jnp.tril(jnp.ones((1, length, length), bool)))]
    compiled = jax.jit(attend).lower(query, segments).compile()
    np.testing.assert_allclose(compiled(query, segments), attend_block(query, segments), rtol=1e-5, atol=1e-6)
    scores = 4 * 2 * length**2
    assert (compiled.memory_analysis().temp_size_in_bytes < scores) == (length >= LONG)
