"""Losses of targets and drafters. All are means over the positions a mask selects, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

RANKED = 10
"""Tokens whose order the published ranking loss looks at."""


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` `[B, S]` where `mask` `[B, S]`; 0 where nothing is selected."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(mask.sum(), 1.0)


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of `labels` i32 `[B, S]` under `logits` `[B, S, V]`."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -masked_mean(jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], mask)


def next_token_loss(logits: jax.Array, input_ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict]:
    """Cross-entropy of the tokens of `input_ids` i32 `[B, S]` that `mask` selects under the `logits` `[B, S - 1, V]` of
    the rows before them, and how often they are the first choice."""
    labels, mask = input_ids[:, 1:], mask[:, 1:]
    return cross_entropy(logits, labels, mask), {"accuracy": masked_mean(logits.argmax(axis=-1) == labels, mask)}


def smooth_l1(output: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Huber loss with threshold 1 between features `[B, S, D]`, mean over D (EAGLE's feature loss)."""
    error = jnp.abs(output.astype(jnp.float32) - target.astype(jnp.float32))
    loss = jnp.where(error < 1, 0.5 * error**2, error - 0.5)
    return masked_mean(loss.mean(axis=-1), mask)


def soft_cross_entropy(logits: jax.Array, target_logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Cross-entropy of the draft distribution against the target's, logits `[B, S, V]`."""
    target = jax.nn.softmax(target_logits.astype(jnp.float32), axis=-1)
    return -masked_mean(jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1), mask)


def probability_l1(logits: jax.Array, target_logits: jax.Array, mask: jax.Array) -> jax.Array:
    """L1 distance of the two distributions, summed over the vocabulary: twice the probability that an optimal coupling
    of draft and target disagrees (ViSpec stage 2)."""
    difference = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) - jax.nn.softmax(
        target_logits.astype(jnp.float32), axis=-1
    )
    return masked_mean(jnp.abs(difference).sum(axis=-1), mask)


def ranking(logits: jax.Array, target_logits: jax.Array, mask: jax.Array, top: int = RANKED) -> jax.Array:
    """Negative Plackett-Luce log-likelihood of the target's order of its `top` tokens under the draft's logits."""
    order = jax.lax.top_k(target_logits, top)[1]  # [B, S, top]
    chosen = jnp.take_along_axis(logits.astype(jnp.float32), order, axis=-1)
    remaining = jnp.flip(jax.lax.cumlogsumexp(jnp.flip(chosen, -1), axis=chosen.ndim - 1), -1)
    return -masked_mean(jnp.sum(chosen - remaining, axis=-1), mask)


def overlap(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """The probability f32 `[B, S]` that an optimal coupling of draft and target agrees, logits `[B, S, V]`."""
    draft, target = (jax.nn.softmax(each.astype(jnp.float32), axis=-1) for each in (logits, target_logits))
    return jnp.minimum(draft, target).sum(axis=-1)


def expected_share(overlaps: Sequence[jax.Array]) -> jax.Array:
    """Expected accepted share f32 `[B, S]` of a chain of K draft tokens that begins at each row: entry k of `overlaps`
    `[B, S]` is the probability that the k-th token of a draft is accepted if it stands in that row."""
    reached, total = jnp.ones_like(overlaps[0]), jnp.zeros_like(overlaps[0])
    for depth, each in enumerate(overlaps):
        following = jnp.pad(each[:, depth:], ((0, 0), (0, depth)))  # what stands `depth` rows later
        reached = reached * following
        total = total + reached
    return total / len(overlaps)
