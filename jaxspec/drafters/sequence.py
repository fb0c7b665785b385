"""What an EAGLE-like head reads: its own sequence, where a prompt's images stand in it, and how its entries are picked
and moved together.

Entry i of a prompt's sequence stands for token i + 1, so everything here is shifted by one against the target's tokens.
Methods that see images through fewer entries leave some out; each keeps its position in the target's sequence.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.drafters.contract import DrafterContext


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadInputs:
    """A sequence as the head reads it: L entries, text only or with images in whatever form the method gives them."""

    embeds: jax.Array  # [B, L, D], embedding of the token after the entry's position
    features: jax.Array  # [B, L, D], target feature of the entry's position
    positions: jax.Array  # i32 [B, L], position in the target's sequence
    valid: jax.Array  # bool [B, L], the first entries of each row
    global_features: jax.Array | None = None  # [B, L, D], what ViSpec sets beside a feature
    direct: jax.Array | None = None  # [B, L, D], entries that bypass `fc`
    is_direct: jax.Array | None = None  # bool [B, L]

    @property
    def count(self) -> jax.Array:
        """Valid entries, i32 `[B]`."""
        return self.valid.sum(axis=1, dtype=jnp.int32)


class ImageSpans(NamedTuple):
    """The entries of up to n images per prompt, in reading order; each image has any number of them."""

    ids: jax.Array  # i32 [B, S], which image an entry belongs to, -1 for text
    masks: jax.Array  # bool [B, n, S], the entries of each image
    last: jax.Array  # i32 [B, n], its last entry, -1 for absent images

    @classmethod
    def of(cls, ids: jax.Array, images: int) -> "ImageSpans":
        """Those of `images` images at most."""
        masks = ids[:, None] == jnp.arange(images)[:, None]
        return cls(ids, masks, jnp.max(jnp.where(masks, jnp.arange(ids.shape[1]), -1), axis=-1))


def image_spans(context: DrafterContext) -> ImageSpans:
    """Of prompts whose every token has an entry."""
    return ImageSpans.of(jnp.roll(context.image_ids, -1, axis=1).at[:, -1].set(-1), context.max_images)


def fewest_image_entries(context: DrafterContext) -> int:
    """The least number of image entries in a prompt: the first token of a prompt has none, and it may be an image's."""
    return max(context.min_image_tokens - 1, 0)


def take_entries(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries `index` i32 `[B, L]` of `x` `[B, S, D]`."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def entry_order(positions: jax.Array, valid: jax.Array, count: int) -> jax.Array:
    """Indices i32 `[B, count]` of the valid entries by position (those at one position stay in order), others after
    them; `positions` i32 and `valid` bool `[B, L]`."""
    behind = jnp.iinfo(positions.dtype).max
    return jnp.argsort(jnp.where(valid, positions, behind), axis=1, stable=True)[:, :count]
