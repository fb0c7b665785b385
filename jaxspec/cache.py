"""Key-value caches of fixed capacity with a length per row.

A cache is one `LayerKV` `[B, Hkv, S, Dh]` per layer; lengths live beside it, in whatever state owns it. Rows past a
length hold leftovers and are masked, so rolling back is not writing, and committing is one scatter per layer.
"""

import jax
import jax.numpy as jnp

from jaxspec.kernels.attention import LayerKV


def extend(kv: LayerKV, capacity: int) -> LayerKV:
    """The keys and values of a prompt in a cache of `capacity` rows."""
    missing = capacity - kv.keys.shape[2]
    if missing < 0:
        raise ValueError(f"a prompt of {kv.keys.shape[2]} rows does not fit a cache of {capacity}")
    return LayerKV(*(jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0))) for part in kv))


def write(kv: LayerKV, new: LayerKV, start: jax.Array, count: jax.Array) -> LayerKV:
    """The first `count` i32 `[B]` rows of `new` `[B, Hkv, P, Dh]`, written from row `start` i32 `[B]` of each batch
    entry on; rows past S are dropped.

    `count` must come from what was computed with `kv`: only then does XLA see that nobody reads the old cache any more
    and writes in place instead of copying it (docs/LOG.md).
    """
    batch, _, length, _ = new.keys.shape
    capacity, steps = kv.keys.shape[2], jnp.arange(length)
    rows = jnp.where(steps < count[:, None], start[:, None] + steps, capacity)  # [B, P]
    entries = jnp.arange(batch)[:, None]

    def update(part, block):
        # A scatter: slice updates row by row were 24 times slower at batch 32 on CPU (docs/LOG.md).
        block = block.swapaxes(1, 2).astype(part.dtype)  # [B, P, Hkv, Dh]
        return part.at[entries, :, rows].set(block, mode="drop")

    return LayerKV(update(kv.keys, new.keys), update(kv.values, new.values))


def take(kv: LayerKV, path: jax.Array) -> LayerKV:
    """Entries `path` i32 `[B, P]` of new keys and values `[B, Hkv, N, Dh]`."""
    return LayerKV(*(jnp.take_along_axis(part, path[:, None, :, None], axis=2) for part in kv))


def filled(lengths: jax.Array, capacity: int) -> jax.Array:
    """Bool `[B, 1, S]`: the rows of a cache that hold committed tokens."""
    return (jnp.arange(capacity) < lengths[:, None])[:, None, :]
