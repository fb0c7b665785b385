"""Filters of sampling: temperature, top-k, top-p and min-p, in the order and with the meaning of transformers' logits
warpers, each on what the one before it left.

Each keeps the tokens at or above some value, so a row needs three of these floors and no sort. Top-k's comes from a
partial sort, min-p's from the largest logit; top-p's takes a bisection over the bits of float32, 32 masked reductions,
which `jaxspec.speculation.sampling.choose` does without: `warp` is for whoever wants the whole filtered distribution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.vocabulary import largest_tokens, total

FEW = 64
"""Up to so many tokens a top-k filter is looked up in a partial sort (Gemma3's k), beyond it is searched for."""

_SIGN_BIT = np.uint32(0x80000000)
_KEY_OF_MINUS_INFINITY = np.uint32(0x007FFFFF)
_KEY_OF_INFINITY = np.uint32(0xFF800000)


def warp(logits: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Temperature and filters: softmax of the result is the distribution that the row samples from.

    Equal to transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper in this order,
    but for ties: where several tokens share the value at which top-p cuts, transformers keeps as many of them as the
    mass needs, in an order its sort leaves open; here a token stays iff the tokens strictly more probable than it hold
    less than top_p, so equal tokens stay or go together. Top-k keeps all ties of the k-th value, there as here.

    The search for a threshold runs only if a sampled row of the batch uses that filter. (Under `jax.vmap` it always
    would: batch with the leading axis instead.)

    Args:
      logits: [B, N, V], any float dtype, no NaN, at least one finite value for each of the B x N.
      sampling: of B rows.

    Returns:
      f32 [B, N, V]. Removed tokens are -inf. Rows with temperature 0 come back as they were, for their argmax survives
      every filter.
    """
    logits = logits.astype(jnp.float32)
    any_sampled = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(any_sampled, _warp_sampled, lambda logits, _: logits, logits, sampling)


def _warp_sampled(logits: jax.Array, sampling: BatchSampling) -> jax.Array:
    scaled = scale(logits, sampling)  # [B, N, V]
    top_k = top_k_floor(scaled, sampling)
    floor = jnp.maximum(jnp.maximum(top_k, min_p_floor(scaled, sampling)), _top_p_floor(scaled, top_k, sampling))
    return jnp.where(scaled >= floor[..., None], scaled, -jnp.inf)


def scale(logits: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Logits f32 `[B, N, V]` over the temperature; those of greedy rows as they are."""
    return logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None, None]


def uses_top_k(sampling: BatchSampling) -> jax.Array:
    return (sampling.temperature > 0) & (sampling.top_k > 0)


def uses_top_p(sampling: BatchSampling) -> jax.Array:
    return (sampling.temperature > 0) & (sampling.top_p < 1)


def uses_min_p(sampling: BatchSampling) -> jax.Array:
    return (sampling.temperature > 0) & (sampling.min_p > 0)


def _floor_of(rows: jax.Array, find: Callable[[], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The thresholds f32 `[B, N]` of one filter, -inf in rows (bool `[B]`) that do not use it; costs nothing where none
    does."""
    nothing = jnp.full(shape, -jnp.inf)
    return jax.lax.cond(jnp.any(rows), lambda: jnp.where(rows[:, None], find(), nothing), lambda: nothing)


def top_k_floor(scaled: jax.Array, sampling: BatchSampling) -> jax.Array:
    """The k-th largest value; -inf where V < k."""
    rows, top_k, size = uses_top_k(sampling), sampling.top_k[:, None], scaled.shape[-1]
    few = min(FEW, size)

    def sorted_few() -> jax.Array:
        values = largest_tokens(scaled, few)[0]  # [B, N, few]
        place = jnp.clip(top_k - 1, 0, few - 1)[..., None]
        return jnp.take_along_axis(values, jnp.broadcast_to(place, (*values.shape[:-1], 1)), axis=-1)[..., 0]

    def searched() -> jax.Array:
        def at_least_k(value: jax.Array) -> jax.Array:  # [B, N] -> bool [B, N]
            return jnp.sum(scaled >= value[..., None], axis=-1, dtype=jnp.int32) >= top_k

        return _largest_value(at_least_k, scaled.shape[:-1])

    def find() -> jax.Array:
        return jax.lax.cond(jnp.all(~rows | (sampling.top_k <= few)), sorted_few, searched)

    return _floor_of(rows, find, scaled.shape[:-1])


def top_p_mass(weights: jax.Array, sampling: BatchSampling) -> jax.Array:
    """How much weight f32 `[B, N]` the tokens more probable than a kept one stay below; inf without the filter.
    `weights` are `[B, N, V]` in 0..1, 0 where top-k removes."""
    # A product that underflows must still ask for more than nothing, or no token would stay.
    mass = jnp.maximum(sampling.top_p[:, None] * total(weights), jnp.finfo(jnp.float32).tiny)
    return jnp.where(uses_top_p(sampling)[:, None], mass, jnp.inf)


def _top_p_floor(scaled: jax.Array, top_k: jax.Array, sampling: BatchSampling) -> jax.Array:
    """The largest value v such that the tokens >= v hold top_p of the mass of those that top-k keeps."""

    def find() -> jax.Array:
        peak = jnp.max(scaled, axis=-1, keepdims=True)  # [B, N, 1]
        weights = jnp.where(scaled >= top_k[..., None], jnp.exp(scaled - peak), 0.0)  # [B, N, V]
        mass = top_p_mass(weights, sampling)

        def mass_reached(value: jax.Array) -> jax.Array:  # [B, N] -> bool [B, N]
            return total(jnp.where(scaled >= value[..., None], weights, 0.0)) >= mass

        return _largest_value(mass_reached, scaled.shape[:-1])

    return _floor_of(uses_top_p(sampling), find, scaled.shape[:-1])


def draft_floor(scaled: jax.Array, sampling: BatchSampling) -> jax.Array:
    """What the filters keep of a drafter's own tokens, f32 `[B, N]`: those of `scaled` f32 `[B, N, V]` at or above it.

    Drafts need no exact filter, the target decides: where more than `FEW` tokens are kept by top-p, it removes none.
    """
    few = min(FEW, scaled.shape[-1])

    def nucleus() -> jax.Array:
        values, _ = largest_tokens(scaled, few)  # [B, N, few]
        log_total = jax.nn.logsumexp(jnp.where(scaled >= top_k[..., None], scaled, -jnp.inf), axis=-1, keepdims=True)
        above = jnp.cumsum(jnp.exp(values - log_total), axis=-1)  # with the token itself
        kept = jnp.sum(above < sampling.top_p[:, None, None], axis=-1, keepdims=True)  # tokens before the last kept one
        last = jnp.take_along_axis(values, jnp.minimum(kept, few - 1), axis=-1)
        return jnp.where(kept < few, last, -jnp.inf)[..., 0]

    top_k = top_k_floor(scaled, sampling)
    top_p = _floor_of(uses_top_p(sampling), nucleus, scaled.shape[:-1])
    return jnp.maximum(jnp.maximum(top_k, top_p), min_p_floor(scaled, sampling))


def min_p_floor(scaled: jax.Array, sampling: BatchSampling) -> jax.Array:
    """probability >= min_p * (largest probability), as a bound on the logits; what other filters leave cancels in the
    ratio."""

    def find() -> jax.Array:
        return jnp.max(scaled, axis=-1) + jnp.log(sampling.min_p)[:, None]

    return _floor_of(uses_min_p(sampling), find, scaled.shape[:-1])


def _largest_value(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The largest float32 for which a monotone predicate holds, for each element of `shape`; -inf if for none.

    `holds` maps f32 `shape` to bool `shape` and, once false, stays false for larger values. The search fixes one bit
    of the value's key after the other, from the highest; keys are uint32 in the order of the floats they stand for.
    """

    def fix_bit(i: jax.Array, key: jax.Array) -> jax.Array:
        candidate = key | (_SIGN_BIT >> i.astype(jnp.uint32))
        return jnp.where(holds(_value_of_key(candidate)), candidate, key)

    return _value_of_key(jax.lax.fori_loop(0, 32, fix_bit, jnp.zeros(shape, jnp.uint32)))


def _value_of_key(key: jax.Array) -> jax.Array:
    """Inverse of the order-preserving map float32 -> uint32; keys beyond the infinities (NaNs) become infinities."""
    key = jnp.clip(key, _KEY_OF_MINUS_INFINITY, _KEY_OF_INFINITY)
    bits = jnp.where(key >= _SIGN_BIT, key ^ _SIGN_BIT, ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
