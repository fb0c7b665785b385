"""Where a prompt's images stand among the rows of an EAGLE-like head, and how rows are picked and moved together.

Row i of such a head stands for token i + 1, so everything here is shifted by one against the target's tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.drafters.contract import DrafterContext


class ImageSpans(NamedTuple):
    """The rows of up to n images per prompt, in reading order; each image has any number of them."""

    ids: jax.Array  # i32 [B, S], which image a row belongs to, -1 for text
    masks: jax.Array  # bool [B, n, S], the rows of each image
    last: jax.Array  # i32 [B, n], its last row, -1 for absent images


def image_spans(context: DrafterContext) -> ImageSpans:
    ids = jnp.roll(context.image_ids, -1, axis=1).at[:, -1].set(-1)
    masks = ids[:, None] == jnp.arange(context.max_images)[:, None]
    return ImageSpans(ids, masks, jnp.max(jnp.where(masks, jnp.arange(ids.shape[1]), -1), axis=-1))


def fewest_image_rows(context: DrafterContext) -> int:
    """The least number of image rows in a prompt: the first token of a prompt has none, and it may be an image's."""
    return max(context.min_image_tokens - 1, 0)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` i32 `[B, R]` of `x` `[B, S, D]`."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def row_order(positions: jax.Array, valid: jax.Array, slots: int) -> jax.Array:
    """Indices i32 `[B, slots]` of the valid rows by position (rows at one position stay in order), others after them;
    `positions` i32 and `valid` bool `[B, R]`."""
    behind = jnp.iinfo(positions.dtype).max
    return jnp.argsort(jnp.where(valid, positions, behind), axis=1, stable=True)[:, :slots]
