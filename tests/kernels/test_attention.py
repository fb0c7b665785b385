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


def test_a_length_that_is_no_multiple_of_a_block_is_taken_at_once():
    query = jnp.ones((1, 1, LONG + 1, 4))
    kv = LayerKV(jnp.ones((1, 1, 3, 4)), jnp.arange(12.0).reshape(1, 1, 3, 4))
    out = attend(query, [Segment(kv, jnp.ones((1, 1, 3), bool))])
    np.testing.assert_allclose(out, np.broadcast_to([4.0, 5, 6, 7], out.shape), rtol=1e-6)
