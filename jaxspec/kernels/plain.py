"""Attention written in jax.numpy: what everything else here must equal, and what a CPU runs.

Two forms of one sum: all keys at once, or those of a cache part by part, as far as they are filled. Differentiable.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp

from jaxspec.kernels.segments import MASKED, Keys, Scores, Segment, merged

LONG, BLOCK = 512, 256
"""Queries from `LONG` on are taken `BLOCK` at a time (docs/LOG.md), the last block padded."""
PART = 128
"""Positions of a roomy cache that are read at a time."""


def attend(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> jax.Array:
    """Softmax attention over the union of the segments, with grouped query heads, softmax in float32.

    `query` is `[B, H, N, Dh]`, H a multiple of Hkv; `how` says what products of queries and keys become. Returns
    `[B, H, N, Dh]` in the query's dtype. A query that sees nothing returns some finite average (of padding). From
    `LONG` on, queries are taken in blocks, so that no more than `[B, H, BLOCK, S]` scores are held at once.
    """
    batch, heads, length, head_dim = query.shape
    keys = merged(segments)
    if length < LONG:
        numbers = jnp.arange(length)
        if len(keys) == 1 or not keys[0].is_roomy_cache:
            return attend_block(query, numbers, keys, how)
        # Other backends start a kernel for every step of a loop, which takes longer than reading what is not filled.
        return jax.lax.platform_dependent(
            query,
            keys,
            cpu=lambda query, keys: attend_filled(query, numbers, keys, how),
            default=lambda query, keys: attend_block(query, numbers, keys, how),
        )
    blocks = -(-length // BLOCK)
    # Padded, so that no length switches blocks off.
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, blocks * BLOCK - length), (0, 0)))
    queries = jnp.moveaxis(padded.reshape(batch, heads, blocks, BLOCK, head_dim), 2, 0)
    numbers = jnp.arange(blocks * BLOCK).reshape(blocks, BLOCK)
    one = jax.checkpoint(lambda block: attend_block(block[0], block[1], keys, how))
    out = jax.lax.map(one, (queries, numbers))
    return jnp.moveaxis(out, 0, 2).reshape(padded.shape)[:, :, :length]


def attend_block(query: jax.Array, numbers: jax.Array, segments: Sequence[Keys], how: Scores) -> jax.Array:
    """The same for all queries `[B, H, n, Dh]` at once, which have these `numbers` i32 `[n]` in the masks."""
    batch, heads, length, head_dim = query.shape
    kv_heads = segments[0].kv.keys.shape[1]
    groups = heads // kv_heads
    # Query heads that share a key head become extra queries of one matrix product.
    queries = query.reshape(batch, kv_heads, groups * length, head_dim)

    def scores(keys: Keys) -> jax.Array:  # [B, Hkv, G, n, S]
        logits = jnp.einsum("bhnd,bhsd->bhns", queries, keys.kv.keys, preferred_element_type=jnp.float32)
        logits = how.scores(logits.reshape(batch, kv_heads, groups, length, -1), head_dim)
        return jnp.where(keys.visible(numbers)[:, None, None], logits, MASKED)

    def mix(weights: jax.Array, keys: Keys) -> jax.Array:  # [B, Hkv, G * n, Dh]
        values = keys.kv.values
        weights = weights.astype(values.dtype).reshape(batch, kv_heads, groups * length, -1)
        return jnp.einsum("bhns,bhsd->bhnd", weights, values, preferred_element_type=jnp.float32)

    logits = [scores(keys) for keys in segments]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in logits]))
    weights = [jnp.exp(part - peak) for part in logits]
    total = reduce(jnp.add, [part.sum(-1, keepdims=True) for part in weights])  # [B, Hkv, G, n, 1]
    out = reduce(jnp.add, [mix(part, keys) for part, keys in zip(weights, segments, strict=True)])
    # Divided last: by Dh numbers a query instead of S.
    out = out.reshape(batch, heads, length, head_dim) / total.reshape(batch, heads, length, 1)
    return out.astype(query.dtype)


def attend_filled(query: jax.Array, numbers: jax.Array, segments: Sequence[Keys], how: Scores) -> jax.Array:
    """The same where the first segment is a roomy cache: time follows what is filled of it and within some query's
    window. What a row gets does not depend on how much the others have filled: parts that it does not see add zeros.
    """
    cache, rest = segments[0], segments[1:]
    (keys, values), mask = cache.kv, cache.parts[0].mask
    batch, heads, length, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    queries = query.reshape(batch, kv_heads, -1, head_dim)

    def scores(keys: jax.Array, visible: jax.Array) -> jax.Array:  # [B, Hkv, G * n, S]
        logits = jnp.einsum("bhnd,bhsd->bhns", queries, keys, preferred_element_type=jnp.float32)
        logits = how.scores(logits, head_dim)
        grouped = logits.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        return jnp.where(visible[:, None, None], grouped, MASKED).reshape(logits.shape)

    def mixed(weights: jax.Array, values: jax.Array) -> jax.Array:  # [B, Hkv, G * n, Dh]
        weights = weights.astype(values.dtype)
        return jnp.einsum("bhns,bhsd->bhnd", weights, values, preferred_element_type=jnp.float32)

    def joined(so_far: tuple, logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, out = so_far
        higher = jnp.maximum(peak, logits.max(-1, keepdims=True))
        shrink, weights = jnp.exp(peak - higher), jnp.exp(logits - higher)
        return higher, total * shrink + weights.sum(-1, keepdims=True), out * shrink + mixed(weights, values)

    def part(number: jax.Array, so_far: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = jnp.minimum(number * PART, capacity - PART)  # the last part may lie over the one before
        places = start + jnp.arange(PART)
        seen = mask.of_keys(numbers, places) & (places >= number * PART)
        block, its_values = (jax.lax.dynamic_slice_in_dim(x, start, PART, axis=2) for x in (keys, values))
        return joined(so_far, scores(block, seen), its_values)

    # What follows the cache comes first: every query sees something there, so that no peak is a masked one.
    zeros = jnp.zeros((*queries.shape[:3], 1))
    so_far = (jnp.full_like(zeros, MASKED), zeros, jnp.zeros(queries.shape))
    for each in rest:
        so_far = joined(so_far, scores(each.kv.keys, each.visible(numbers)), each.kv.values)
    first = 0
    if mask.window is not None and mask.query_places is not None:
        first = jnp.maximum(jnp.min(mask.query_places) - mask.window + 1, 0) // PART
    assert mask.lengths is not None  # it is a cache
    last = (jnp.max(mask.lengths) + PART - 1) // PART
    _, total, out = jax.lax.fori_loop(first, last, part, so_far)
    return (out / total).reshape(query.shape).astype(query.dtype)
