"""Losses of targets and drafters. All are means over the positions a mask selects, in float32."""

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` `[B, S]` where `mask` `[B, S]`; 0 where nothing is selected."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(mask.sum(), 1.0)


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of `labels` i32 `[B, S]` under `logits` `[B, S, V]`."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -masked_mean(jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], mask)
