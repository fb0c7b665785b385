"""What is asked of all tokens at once, `[.., V]`: the best one, the k best, the values of some, the sum of weights.

On a mesh that splits the vocabulary every device looks through its own tokens, and what it has found, a few numbers, is
exchanged: no array over the vocabulary moves. The answers are those of one device, bit by bit: comparing has no order,
and weights are added as integers.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxspec.splitting import BATCH, TENSOR, on_each, shares

Found = TypeVar("Found")
BLOCK = 128
"""Logits whose largest is found at once."""
DIGITS, BITS = 3, 12
"""Weights are added as numbers of so many digits with so many bits: 2**18 of them fit an int32."""


def first_argmax(x: jax.Array) -> jax.Array:
    """i32 `[..]`: the lowest index of the largest value of `x` f32 `[.., V]`; any index where there is a NaN.

    The largest value of each block of 128 is a plain reduction, which XLA vectorises on CPU; its own argmax of a whole
    vocabulary takes ten times as long.
    """

    def own(x: jax.Array, first: jax.Array) -> jax.Array:
        token = _first_argmax(x)
        value = jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]
        values, tokens = exchanged(value, token + first)  # [T, ..]
        return jnp.take_along_axis(tokens, jnp.argmax(values, axis=0)[None], axis=0)[0]

    return on_shards(own, x) if is_split(x) else _first_argmax(x)


def _first_argmax(x: jax.Array) -> jax.Array:
    missing = -x.shape[-1] % BLOCK
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)  # [..]
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + jnp.argmax(within, axis=-1).astype(jnp.int32)


def largest_tokens(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values of `x` f32 `[.., V]`, and whose they are, i32; the order of equal ones is open."""

    def own(x: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, tokens = largest(x, min(count, x.shape[-1]))
        values, tokens = (
            jnp.moveaxis(each, 0, -2).reshape(*each.shape[1:-1], -1) for each in exchanged(values, tokens + first)
        )  # [.., T * count]
        values, places = largest(values, count)
        return values, jnp.take_along_axis(tokens, places, axis=-1)

    return on_shards(own, x) if is_split(x) else largest(x, count)


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last axis of `x` `[.., V]`, which on TPU is a sort of everything for more than two axes.
    The order of equal values is the backend's: no result may rest on it."""
    rows = shares(BATCH, x.shape[0])
    if rows is not None:  # XLA does not split such a call, and would gather all rows
        part = PartitionSpec(rows)
        return on_each(lambda x: largest(x, count), part, (part, part))(x)
    values, places = jax.lax.top_k(x.reshape(-1, x.shape[-1]), count)
    return values.reshape(*x.shape[:-1], count), places.reshape(*x.shape[:-1], count)


def values_at(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """`[.., K]`: what `x` `[.., V]` holds for `tokens` i32 `[.., K]`."""

    def own(x: jax.Array, first: jax.Array, tokens: jax.Array) -> jax.Array:
        places = tokens - first
        here = (places >= 0) & (places < x.shape[-1])
        found = jnp.take_along_axis(x, jnp.clip(places, 0, x.shape[-1] - 1), axis=-1)
        return jax.lax.psum(jnp.where(here, found, 0), TENSOR)  # all but one are 0

    return on_shards(own, x, tokens) if is_split(x) else jnp.take_along_axis(x, tokens, axis=-1)


def with_values(x: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
    """`x` `[B, N, V]` with `values` `[B, N, K]` at `tokens` i32 `[B, N, K]`; what lies behind the vocabulary is
    dropped."""

    def own(x: jax.Array, first: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
        places = tokens - first
        places = jnp.where(places < 0, x.shape[-1], places)  # which would count from the end
        batch, nodes = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[:, None]
        return x.at[batch, nodes, places].set(values, mode="drop")

    if not is_split(x):
        return own(x, jnp.int32(0), tokens, values)
    return on_shards(own, x, tokens, values, out_split=True)


def total(weights: jax.Array) -> jax.Array:
    """f32 `[..]`: the sum of `weights` f32 `[.., V]` in 0..1, each cut to a multiple of 2**-36. The same number in
    whatever order they are added, on however many devices: integers have no rounding."""
    rest, result = weights, jnp.zeros(weights.shape[:-1])
    for digit in range(1, DIGITS + 1):
        scaled = rest * 2.0**BITS
        whole = jnp.floor(scaled)
        rest = scaled - whole
        result = result + jnp.sum(whole.astype(jnp.int32), axis=-1).astype(jnp.float32) * 2.0 ** (-BITS * digit)
    return result


def is_split(x: jax.Array) -> bool:
    """Whether the mesh in use splits the vocabulary of `x` `[.., V]`."""
    return shares(TENSOR, x.shape[-1]) is not None


def on_shards(own: Callable[..., Found], x: jax.Array, *others: jax.Array, out_split: bool = False) -> Found:
    """`own(its part of x [B, .., V], the first token of it, its rows of the others)` on every device."""
    rows = shares(BATCH, x.shape[0])
    split, whole = PartitionSpec(rows, *[None] * (x.ndim - 2), TENSOR), PartitionSpec(rows)

    def run(x: jax.Array, *others: jax.Array) -> Found:
        return own(x, jax.lax.axis_index(TENSOR) * x.shape[-1], *others)

    return on_each(run, (split, *[whole] * len(others)), split if out_split else whole)(x, *others)


def exchanged(values: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What all devices have found, f32 and i32 `[T, ..]`, in the order of their tokens; one exchange."""
    pair = jnp.stack([jax.lax.bitcast_convert_type(values, jnp.int32), tokens.astype(jnp.int32)])
    pairs = jax.lax.all_gather(pair, TENSOR)  # [T, 2, ..]
    return jax.lax.bitcast_convert_type(pairs[:, 0], jnp.float32), pairs[:, 1]
