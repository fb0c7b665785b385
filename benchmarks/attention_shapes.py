"""Attention as published models ask for it, by name: what tests compile and benchmarks time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.published import TARGETS
from jaxspec.cache import LayerKV
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Segment


class AttentionShape(NamedTuple):
    """Sizes of one call of `attend`."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    capacity: int = 2048
    """Of the cache; 0 for tokens that attend to themselves alone."""
    filled: int = 860
    window: int | None = None
    drafted: int = 0
    """Tokens of earlier levels of a tree."""
    causal: bool = False
    """Queries are a prompt, not a tree."""
    batch: int = 1

    def arguments(self, dtype: DTypeLike = jnp.bfloat16) -> tuple[jax.Array, list[Segment]]:
        """Random queries and segments; the rows of a batch have filled different parts of what `filled` says."""
        keys = iter(jax.random.split(jax.random.key(0), 8))

        def normal(heads: int, length: int) -> jax.Array:
            return jax.random.normal(next(keys), (self.batch, heads, length, self.head_dim), dtype)

        def segment(length: int, mask: Mask) -> Segment:
            return Segment(LayerKV(normal(self.kv_heads, length), normal(self.kv_heads, length)), mask)

        lengths = self.filled - 64 * jnp.arange(self.batch)
        places = lengths[:, None] + jnp.arange(self.queries) if self.window else None
        segments = []
        if self.capacity:
            segments.append(segment(self.capacity, Mask(lengths, places, window=self.window)))
        if self.drafted:
            chains = jnp.arange(self.drafted) % self.queries == jnp.arange(self.queries)[:, None]
            ancestors = jnp.broadcast_to(chains, (self.batch, *chains.shape))
            segments.append(segment(self.drafted, Mask(ancestors=ancestors)))
        if self.causal:
            own = Mask(jnp.full((self.batch,), self.queries), places, places, causal=True, window=self.window)
        else:  # a binary tree in level order
            number = jnp.arange(self.queries)
            line, ancestors = number, jnp.eye(self.queries, dtype=bool)
            for _ in range(self.queries.bit_length()):
                line = jnp.maximum(line - 1, 0) // 2
                ancestors = ancestors | (line[:, None] == number)
            ancestors = jnp.broadcast_to(ancestors, (self.batch, *ancestors.shape))
            own = Mask(None, places, places, ancestors=ancestors, window=self.window)
        segments.append(segment(self.queries, own))
        return normal(self.heads, self.queries), segments

    def least_bytes(self, itemsize: int = 2) -> int:
        """Of queries, output, and the keys and values that are seen: what must be moved."""
        seen = sum(
            min(self.filled - 64 * row, self.window or self.filled) if self.capacity else 0 for row in range(self.batch)
        )
        keys = seen + self.batch * (self.queries + self.drafted)
        return 2 * itemsize * self.head_dim * (self.kv_heads * keys + self.batch * self.heads * self.queries)


def heads_of(model: str) -> tuple[int, int, int]:
    """Query heads, key heads and their width."""
    text = TARGETS[model].config.text
    return text.num_heads, text.num_kv_heads, text.head_dim


SHAPES = {
    f"{name}, {what}": AttentionShape(*heads_of(name), **options)
    for name in TARGETS
    for what, options in {
        "one token": {"queries": 1},
        "tree of 30": {"queries": 30},
        "tree of 60, batch 8": {"queries": 60, "batch": 8},
        "third draft level": {"queries": 8, "drafted": 16},
        "chunk of 512": {"queries": 512, "causal": True},
        "first chunk of 512": {"queries": 512, "causal": True, "capacity": 0},
    }.items()
} | {"gemma3-12b, window, tree of 30": AttentionShape(*heads_of("gemma3-12b"), 30, 4096, 3000, window=1024)}
