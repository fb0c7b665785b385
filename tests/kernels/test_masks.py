"""A mask's structure means what a loop over all pairs says, for any of its queries."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.kernels.masks import Mask

BATCH, QUERIES, KEYS = 2, 6, 9


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_masks_are_what_they_say(data):
    def draw(*shape, low=0, high=9):
        size = int(np.prod(shape))
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size))).reshape(shape)

    def maybe(value):
        return value if data.draw(st.booleans()) else None

    keys = data.draw(st.sampled_from([QUERIES, KEYS]))  # as many as queries where both are the same tokens
    mask = Mask(
        lengths=maybe(draw(BATCH, high=keys)),
        query_places=maybe(draw(BATCH, QUERIES)),
        key_places=maybe(draw(BATCH, keys)),
        groups=maybe(draw(BATCH, QUERIES, low=-1, high=1)) if keys == QUERIES else None,
        ancestors=maybe(draw(BATCH, QUERIES, keys, high=1).astype(bool)),
        dense=maybe(draw(BATCH, data.draw(st.sampled_from([1, QUERIES])), keys, high=1).astype(bool)),
        causal=data.draw(st.booleans()),
        window=maybe(data.draw(st.integers(1, 5))),
    )

    def sees(b: int, i: int, j: int) -> bool:
        place = i if mask.query_places is None else mask.query_places[b, i]
        other = j if mask.key_places is None else mask.key_places[b, j]
        together = mask.groups is not None and mask.groups[b, i] == mask.groups[b, j] >= 0
        return bool(
            (not mask.causal or other <= place or together)
            and (mask.window is None or place - other < mask.window)
            and (mask.lengths is None or j < mask.lengths[b])
            and (mask.ancestors is None or mask.ancestors[b, i, j])
            and (mask.dense is None or mask.dense[b, i if mask.dense.shape[1] > 1 else 0, j])
        )

    queries = np.array([1, 4, 5, 8])  # the last is past the end and counts as the last query where fields are given
    seen = np.broadcast_to(as_arrays(mask).visible(jnp.asarray(queries), keys), (BATCH, 4, keys))
    for b in range(BATCH):
        for n, i in enumerate(queries[:3]):
            assert seen[b, n].tolist() == [sees(b, i, j) for j in range(keys)]


def as_arrays(mask: Mask) -> Mask:
    fields = {name: value for name, value in vars(mask).items() if isinstance(value, np.ndarray)}
    return Mask(**vars(mask) | {name: jnp.asarray(value) for name, value in fields.items()})


def test_one_tree_for_all_rows():
    seen = Mask(lengths=jnp.array([3, 2]), ancestors=jnp.eye(3, dtype=bool)).visible(jnp.arange(3), 3)
    np.testing.assert_array_equal(seen, [np.eye(3), np.diag([1, 1, 0])])
