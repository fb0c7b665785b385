"""Attention of N new tokens over each other and over cached segments.

One function serves prefill and training (no segment, causal mask), autoregressive decoding (N = 1), tree verification
(ancestor mask) and drafting (cache plus the levels drafted so far). New keys and values are not written to the cache
first: a verified tree commits only its accepted path, so a cache never holds rejected rows.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
LONG, BLOCK = 1024, 256
"""Queries from `LONG` on are taken `BLOCK` at a time (docs/LOG.md), the last block padded."""


class LayerKV(NamedTuple):
    """Keys and values of one layer, `[B, Hkv, S, Dh]` each."""

    keys: jax.Array
    values: jax.Array


class Segment(NamedTuple):
    """Tokens to attend to: their keys and values, and who sees them (bool `[B, N, S]`, or `[B, 1, S]` for all N)."""

    kv: LayerKV
    mask: jax.Array


@jax.named_scope("attention")
def attend(query: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Softmax attention over the union of the segments, with grouped query heads, softmax in float32.

    `query` is `[B, H, N, Dh]`, H a multiple of Hkv. Returns `[B, H, N, Dh]` in the query's dtype. A row that sees
    nothing returns some finite average (rows of padding). Many queries are taken in blocks, so that no more than
    `[B, H, BLOCK, S]` scores are held at once.
    """
    length = query.shape[2]
    if length < LONG:
        return attend_block(query, segments)
    spare = -length % BLOCK  # padded, so that no length switches blocks off

    def blocks(x, axis):  # [.., N, ..] -> [blocks, .., BLOCK, ..]
        x = jnp.pad(x, [(0, spare if at == axis else 0) for at in range(x.ndim)])
        shape = x.shape[:axis] + (-1, BLOCK) + x.shape[axis + 1 :]
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    own = [each.mask.shape[1] == length for each in segments]  # a mask of one row serves every block
    masks = [blocks(each.mask, 1) for each, split in zip(segments, own, strict=True) if split]

    def one(block):
        rows, rest = block[0], iter(block[1])
        parts = zip(segments, own, strict=True)
        return attend_block(rows, [Segment(each.kv, next(rest) if split else each.mask) for each, split in parts])

    out = jax.lax.map(one, (blocks(query, 2), masks))  # [blocks, B, H, BLOCK, Dh]
    out = jnp.moveaxis(out, 0, 2).reshape(*query.shape[:2], length + spare, -1)
    return out[:, :, :length]


def attend_block(query: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """The same for all queries at once."""
    batch, heads, length, head_dim = query.shape
    # The first segment is the long one (a cache, never copied); what follows is a few tokens and cheaper as one.
    segments = [*segments[:1], *([join(segments[1:], length)] if len(segments) > 1 else [])]
    kv_heads = segments[0].kv.keys.shape[1]
    groups = heads // kv_heads
    # Query heads that share a key head become extra rows of one matrix product.
    rows = (query * head_dim**-0.5).reshape(batch, kv_heads, groups * length, head_dim)

    def scores(segment):  # [B, Hkv, G, N, S]
        logits = jnp.einsum("bhnd,bhsd->bhns", rows, segment.kv.keys, preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, kv_heads, groups, length, -1)
        return jnp.where(segment.mask[:, None, None], logits, MASKED)

    def mix(weights, segment):  # [B, Hkv, G * N, Dh]
        values = segment.kv.values
        weights = weights.astype(values.dtype).reshape(batch, kv_heads, groups * length, -1)
        return jnp.einsum("bhns,bhsd->bhnd", weights, values, preferred_element_type=jnp.float32)

    logits = [scores(segment) for segment in segments]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in logits]))
    weights = [jnp.exp(part - peak) for part in logits]
    total = reduce(jnp.add, [part.sum(-1, keepdims=True) for part in weights])  # [B, Hkv, G, N, 1]
    out = reduce(jnp.add, [mix(part, segment) for part, segment in zip(weights, segments, strict=True)])
    # Divided last: by Dh numbers a row instead of S.
    out = out.reshape(batch, heads, length, head_dim) / total.reshape(batch, heads, length, 1)
    return out.astype(query.dtype)


def join(segments: Sequence[Segment], length: int) -> Segment:
    """Several segments as one, for a query of `length` tokens."""
    if len(segments) == 1:
        return segments[0]
    kv = LayerKV(*(jnp.concatenate(parts, axis=2) for parts in zip(*(each.kv for each in segments), strict=True)))
    masks = [jnp.broadcast_to(each.mask, (each.mask.shape[0], length, each.mask.shape[2])) for each in segments]
    return Segment(kv, jnp.concatenate(masks, axis=2))
