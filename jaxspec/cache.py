"""Key-value caches of fixed capacity that know how many of their positions are filled.

Positions past a length hold leftovers and are masked, so rolling back is not writing, and taking in what was accepted
is one scatter per layer.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class LayerKV(NamedTuple):
    """Keys and values of one layer, `[B, Hkv, S, Dh]` each."""

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of whole sequences, of a model or of a head of one layer."""

    layers: tuple[LayerKV, ...]  # [B, Hkv, S, Dh], all of one capacity S
    lengths: jax.Array  # i32 [B], positions filled

    @property
    def capacity(self) -> int:
        """Positions that there are, S."""
        return self.layers[0].keys.shape[2]

    @classmethod
    def of_prompt(cls, new: Sequence[LayerKV], lengths: jax.Array, capacity: int) -> "Cache":
        """What reading prompts gave, `[B, Hkv, N, Dh]` per layer of which the first `lengths` i32 `[B]` positions are
        real, with room for `capacity` of them. Raises ValueError where N is more."""
        length = new[0].keys.shape[2]
        if length > capacity:
            raise ValueError(f"a prompt of {length} positions does not fit a cache of {capacity}")
        room = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
        return cls(tuple(LayerKV(*(jnp.pad(part, room) for part in kv)) for kv in new), lengths)

    @classmethod
    def empty(
        cls, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: DTypeLike = jnp.float32
    ) -> "Cache":
        """A cache of `capacity` positions of which none is filled."""

        def zeros() -> jax.Array:  # each an array of its own, which can be donated
            return jnp.zeros((batch, kv_heads, capacity, head_dim), dtype)

        return cls(tuple(LayerKV(zeros(), zeros()) for _ in range(layers)), jnp.zeros((batch,), jnp.int32))

    def append(self, new: Sequence[LayerKV], count: jax.Array) -> "Cache":
        """With the first `count` i32 `[B]` of the new keys and values behind those that are there; what falls past the
        capacity is dropped. `new` is `[B, Hkv, N, Dh]` per layer: a chunk of a prompt, or what `take` picks of a tree.

        Nothing is copied inside a compiled loop: XLA writes a scatter in place where nobody reads the old array any
        more. It sees that only where `count` follows from what was computed with the old array, as the length of an
        accepted path does; any other count costs a copy of the cache (docs/LOG.md).
        """
        batch, kv_heads, length, _ = new[0].keys.shape
        steps = jnp.arange(length)
        positions = jnp.where(steps < count[:, None], self.lengths[:, None] + steps, self.capacity)  # [B, N]
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
        positions = positions[:, None]  # [B, 1, N]

        def write(old: jax.Array, block: jax.Array) -> jax.Array:
            # A scatter: slice updates row by row were 24 times slower at batch 32 on CPU (docs/LOG.md). Of vectors that
            # every head counts for itself: one that writes all heads of a position at once wants positions before heads
            # on TPU, and the whole cache laid out so at every call.
            return old.at[rows, heads, positions].set(block.astype(old.dtype), mode="drop")

        layers = [LayerKV(*map(write, old, kv)) for old, kv in zip(self.layers, new, strict=True)]
        return Cache(tuple(layers), self.lengths + count)


def take(new: Sequence[LayerKV], path: jax.Array) -> tuple[LayerKV, ...]:
    """Of new keys and values `[B, Hkv, N, Dh]` per layer those at `path` i32 `[B, P]`, in their order."""
    return tuple(LayerKV(*(jnp.take_along_axis(x, path[:, None, :, None], axis=2) for x in kv)) for kv in new)


def write_at(buffer: jax.Array, block: jax.Array, start: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """`block` `[B, N, ..]` written into `buffer` `[B, S, ..]` from position `start` i32 `[B]` on; of each row the
    first `count` i32 `[B]` of them, all if not given. What falls past S is dropped."""
    batch, length = block.shape[:2]
    steps = jnp.arange(length)
    positions = start[:, None] + steps
    if count is not None:
        positions = jnp.where(steps < count[:, None], positions, buffer.shape[1])
    return buffer.at[jnp.arange(batch)[:, None], positions].set(block.astype(buffer.dtype), mode="drop")
