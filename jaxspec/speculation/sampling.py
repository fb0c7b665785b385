"""Coupled sampling: the token at a position is a deterministic function of (logits, seed, position).

Autoregressive sampling draws a token from softmax(logits). Here the same draw is written as an argmax,

    token[t] = argmax(warp(logits[t]) + gumbel_noise(seed, t))          (Gumbel-max; exact for every temperature > 0)
    token[t] = argmax(logits[t])                                        (temperature 0)

so that the randomness of a request is fixed before any model runs. Speculative decoding then is lossless as an
equality and not as a statistic: a draft token is right iff it is the token this rule gives for the target's logits, and
neither the drafter, nor the tree, nor the rest of the batch can change what a request receives. A drafter may look at
the same noise, for the tokens that are emitted are the target's own.

Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative decoding"
(arXiv 2408.07978).

No filter (filters.py) sorts the vocabulary or searches it for a threshold: `choose` asks of a token whether the filters
keep it, which is one sum over the more probable ones. The best token of all is mostly kept, and where it is not, only
what is more probable than it can be chosen.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.speculation.filters import min_p_floor, scale, top_k_floor, top_p_mass, uses_min_p, uses_top_k, uses_top_p
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.threefry import random_bits
from jaxspec.speculation.vocabulary import first_argmax, total, values_at
from jaxspec.splitting import by_vocabulary

PARTS = 8
"""Top-p is asked about the nodes of a row in so many parts."""


def gumbel_noise(seed: jax.Array, positions: jax.Array, vocab_size: int, tokens: jax.Array | None = None) -> jax.Array:
    """The standard Gumbel noise of every (seed, position); a function of nothing else.

    A row's noise does not change with the batch around it, with the positions asked for together, with the mesh, or
    with the PRNG settings of the process (the generator is always threefry, keyed by `fold_in(key(seed), position)`).

    It is not `jax.random.gumbel`, whose float32 noise ends at 15.9 because it draws 23 bits: with 150k tokens, those
    less probable than 1e-7 can hold a visible share of the probability, and could not be drawn. All 32 bits of the
    same draw move the end to 22.9 at the same cost (`mode="high"` of `jax.random.gumbel` costs three times as much).

    Args:
      seed: u32 [B].
      positions: i32 [B, T], absolute positions of the tokens that the noise chooses.
      vocab_size: V.
      tokens: i32 [K] of them, where not all are asked for.

    Returns:
      f32 [B, T, V], or [B, T, K].
    """
    bits = by_vocabulary(random_bits(seed, positions, jnp.arange(vocab_size) if tokens is None else tokens))
    # Upper tail mass: small values, where float32 is dense, become the large noise that decides an argmax.
    tail = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log(-jnp.log1p(-jnp.minimum(tail, 1 - 2.0**-24)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """The sampling noise of the tokens to come, drawn where it is asked for: a greedy batch never holds any."""

    seed: jax.Array  # u32 [B]
    first: jax.Array  # i32 [B], absolute position of the next token
    vocab_size: int = dataclasses.field(metadata={"static": True})

    def levels(self, start: int, count: int, tokens: jax.Array | None = None) -> jax.Array:
        """f32 `[B, count, V]` of the tokens `start`, `start + 1`, .. behind the next one; of a part of the vocabulary,
        `tokens` i32 `[K]`, `[B, count, K]`."""
        positions = self.first[:, None] + start + jnp.arange(count)
        return gumbel_noise(self.seed, positions, self.vocab_size, tokens)


@jax.named_scope("choice")
def choose(logits: jax.Array, noise: Callable[[], jax.Array], sampling: BatchSampling) -> jax.Array:
    """The tokens: argmax of the logits where the temperature is 0, argmax of scaled logits plus noise, among what the
    filters keep, elsewhere. The same tokens as the argmax of `warp(logits, sampling) + noise()`.

    Args:
      logits: [B, N, V], any float dtype, at least one finite value for each of the B x N.
      noise: gives f32 [B, N, V] (or broadcastable to it), from `gumbel_noise`, of the positions of the tokens to
        choose; called in a branch that a greedy batch does not take.
      sampling: of B rows.

    Returns:
      i32 [B, N]; the lowest token id where several are maximal.
    """
    logits = logits.astype(jnp.float32)

    def sampled(logits: jax.Array) -> jax.Array:
        return _choose_sampled(logits, noise(), sampling)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, first_argmax, logits)


@jax.named_scope("grammar")
def allow(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits f32 `[B, N, V]` with -inf at tokens that are not `allowed` u32 `[B, N, W]`: bit t % 32 of word t // 32
    says whether token t is. Of each of the B x N one at least must be."""
    tokens = jnp.arange(logits.shape[-1])
    bits = by_vocabulary(jnp.take(allowed, tokens // 32, axis=-1)) >> (tokens % 32).astype(jnp.uint32) & 1
    return jnp.where(bits == 1, logits.astype(jnp.float32), -jnp.inf)


def _choose_sampled(logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Each branch costs the passes over the logits that its filters need."""
    bounded, nucleus = jnp.any(uses_top_k(sampling) | uses_min_p(sampling)), jnp.any(uses_top_p(sampling))
    branch = jnp.where(nucleus, 2, bounded.astype(jnp.int32))
    return jax.lax.switch(branch, (_choose_unfiltered, _choose_bounded, _choose_nucleus), logits, noise, sampling)


def _scores(logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    """What the argmax is taken of, f32 `[B, N, V]`, before any filter."""
    scaled = scale(logits, sampling)
    return jnp.where((sampling.temperature > 0)[:, None, None], scaled + noise, scaled)


def _choose_unfiltered(logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    return first_argmax(_scores(logits, noise, sampling))


def _choose_bounded(logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Top-k and min-p: what lies above a bound."""
    scaled = scale(logits, sampling)
    floor = jnp.maximum(top_k_floor(scaled, sampling), min_p_floor(scaled, sampling))[..., None]
    return first_argmax(jnp.where(scaled >= floor, _scores(logits, noise, sampling), -jnp.inf))


def _choose_nucleus(logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Top-p as well, which is asked about one token after the other: about the best one, and as long as it is removed,
    about the best of those more probable than it (2 rounds at top_p 0.9, seldom more).

    The most probable token always stays, so only the nodes where another one is best are asked about, a few at a time:
    whole passes over all nodes are those of the unfiltered choice and one for the largest logit.
    """
    batch, nodes, _ = logits.shape
    nothing = jnp.full((batch, nodes), -jnp.inf)

    def floors() -> tuple[jax.Array, jax.Array]:
        scaled = scale(logits, sampling)
        top_k = top_k_floor(scaled, sampling)
        return top_k, jnp.maximum(top_k, min_p_floor(scaled, sampling))

    few = -(-nodes // PARTS)
    bounded = jnp.any(uses_top_k(sampling) | uses_min_p(sampling))
    top_k, floor = jax.lax.cond(bounded, floors, lambda: (nothing, nothing))  # [B, N]
    scaled = scale(logits, sampling)
    token = first_argmax(jnp.where(scaled >= floor[..., None], _scores(logits, noise, sampling), -jnp.inf))
    peak = scale(jnp.max(logits, axis=-1, keepdims=True), sampling)[..., 0]
    value = scale(values_at(logits, token[..., None]), sampling)[..., 0]
    noise = jnp.broadcast_to(noise, logits.shape)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, unsure = carry  # i32 and bool [B, N]
        some, places = jax.lax.top_k(unsure.astype(jnp.int32), few)  # [B, n]

        def of_some(x: jax.Array) -> jax.Array:  # [B, N, ..] -> [B, n, ..]
            return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

        scaled = scale(of_some(logits), sampling)  # [B, n, V]
        value = values_at(scaled, of_some(token)[..., None])  # [B, n, 1]
        weights = jnp.exp(scaled - of_some(peak)[..., None])
        mass = top_p_mass(jnp.where(scaled >= of_some(top_k)[..., None], weights, 0.0), sampling)
        removed = total(jnp.where(scaled > value, weights, 0.0)) >= mass
        kept = (scaled >= of_some(floor)[..., None]) & (scaled > value)
        best = first_argmax(jnp.where(kept, scaled + of_some(noise), -jnp.inf))
        rows, columns = jnp.arange(batch)[:, None], jnp.where(some > 0, places, nodes)
        token = token.at[rows, columns].set(jnp.where(removed, best, of_some(token)), mode="drop")
        return token, unsure.at[rows, columns].set(removed, mode="drop")

    unsure = uses_top_p(sampling)[:, None] & (value < peak)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), again, (token, unsure))[0]
