"""Losses of targets and drafters: values per position of a batch in float32, which `masked_mean` turns into one number.

Logits of a whole batch can be larger than all else in a step (128 rows of 2,048 tokens with 32,000 logits are 34 GB),
so `by_columns` computes what is said of them a few positions at a time.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxspec.layers import LanguageModel
from jaxspec.speculation.vocabulary import largest_tokens

RANKED = 10
"""Tokens whose order the published ranking loss looks at."""
LOGITS = 2**27
"""Most logits of a model that exist at once: half a GiB in float32."""


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` `[B, S]` where `mask` `[B, S]`; 0 where nothing is selected."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(mask.sum(), 1.0)


def by_columns(function: Callable, vocab_size: int, *arrays: jax.Array) -> dict[str, jax.Array]:
    """`function(*arrays)`, a dict of values `[B, S]`, for a function that looks at each position of its `arrays`
    `[B, S, ..]` alone and makes `vocab_size` logits of it.

    It runs on as many columns at a time as have `LOGITS` logits, and again for the gradient.
    """
    batch, length = arrays[0].shape[:2]
    size = max(1, LOGITS // (batch * vocab_size))
    if size >= length:
        return function(*arrays)
    count = -(-length // size)

    def split(x):  # [B, S, ..] -> [count, B, size, ..]
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(jax.checkpoint(lambda columns: function(*columns)), tuple(map(split, arrays)))
    return {name: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for name, x in pieces.items()}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood `[..]` of `labels` i32 `[..]` under `logits` `[.., V]`."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def next_token_loss(
    model: LanguageModel, features: jax.Array, input_ids: jax.Array, mask: jax.Array
) -> tuple[jax.Array, dict]:
    """Cross-entropy of the tokens of `input_ids` i32 `[B, S]` that `mask` selects, as the model's `features`
    `[B, S, D]` of the positions before them foretell them, and how often they are its first choice."""

    def compare(features, labels):
        logits = model.unembed(features)
        return {"loss": cross_entropy(logits, labels), "accuracy": logits.argmax(axis=-1) == labels}

    values = by_columns(compare, model.config.vocab_size, features[:, :-1], input_ids[:, 1:])
    return masked_mean(values["loss"], mask[:, 1:]), {"accuracy": masked_mean(values["accuracy"], mask[:, 1:])}


def smooth_l1(output: jax.Array, target: jax.Array) -> jax.Array:
    """Huber loss with threshold 1 between features `[.., D]`, mean over D (EAGLE's feature loss)."""
    error = jnp.abs(output.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.where(error < 1, 0.5 * error**2, error - 0.5).mean(axis=-1)


def soft_cross_entropy(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Cross-entropy of the draft distribution against the target's, logits `[.., V]`."""
    target = jax.nn.softmax(target_logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)


def probability_l1(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """L1 distance of the two distributions, summed over the vocabulary: twice the probability that an optimal coupling
    of draft and target disagrees (ViSpec stage 2)."""
    difference = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) - jax.nn.softmax(
        target_logits.astype(jnp.float32), axis=-1
    )
    return jnp.abs(difference).sum(axis=-1)


def ranking(logits: jax.Array, target_logits: jax.Array, top: int = RANKED) -> jax.Array:
    """Negative Plackett-Luce log-likelihood of the target's order of its `top` tokens under the draft's logits."""
    order = largest_tokens(target_logits, top)[1]  # [.., top]
    chosen = jnp.take_along_axis(logits.astype(jnp.float32), order, axis=-1)
    remaining = jnp.flip(jax.lax.cumlogsumexp(jnp.flip(chosen, -1), axis=chosen.ndim - 1), -1)
    return -jnp.sum(chosen - remaining, axis=-1)


def overlap(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """The probability f32 `[..]` that an optimal coupling of draft and target agrees, logits `[.., V]`."""
    draft, target = (jax.nn.softmax(each.astype(jnp.float32), axis=-1) for each in (logits, target_logits))
    return jnp.minimum(draft, target).sum(axis=-1)


def expected_share(overlaps: Sequence[jax.Array]) -> jax.Array:
    """Expected accepted share f32 `[B, S]` of a chain of K draft tokens that begins at each position: entry k of
    `overlaps` `[B, S]` is the probability that the k-th token of a draft is accepted if it stands there."""
    reached, total = jnp.ones_like(overlaps[0]), jnp.zeros_like(overlaps[0])
    for depth, each in enumerate(overlaps):
        following = jnp.pad(each[:, depth:], ((0, 0), (0, depth)))  # what stands `depth` positions later
        reached = reached * following
        total = total + reached
    return total / len(overlaps)
