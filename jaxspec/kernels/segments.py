"""What queries attend to: stretches of keys and values, each with its mask. A cache is one, a tree another."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.cache import LayerKV
from jaxspec.kernels.masks import Mask

MASKED = -1e30
"""The score of a key that is not seen: finite, so that a query which sees nothing gets an average and no NaN."""
ROOMY = 512
"""Caches with so many positions or more are read as far as they are filled."""


class Segment(NamedTuple):
    """Tokens to attend to: their keys and values, and who sees them."""

    kv: LayerKV
    mask: Mask


class Keys(NamedTuple):
    """One or more segments side by side."""

    kv: LayerKV
    parts: Sequence[Segment]

    @property
    def is_cache(self) -> bool:
        """Whether it is one segment of which only some is filled, seen by everybody but for a window."""
        mask = self.parts[0].mask
        filled = mask.lengths is not None and not mask.causal and mask.ancestors is None and mask.dense is None
        return len(self.parts) == 1 and filled

    @property
    def is_roomy_cache(self) -> bool:
        """Whether it is a cache with so much room that it pays to leave out what is not filled."""
        return self.is_cache and self.kv.keys.shape[2] >= ROOMY

    def visible(self, queries: jax.Array) -> jax.Array:
        """As of `Mask`."""
        masks = [part.mask.visible(queries, part.kv.keys.shape[2]) for part in self.parts]
        shape = jnp.broadcast_shapes(*(mask.shape[:2] for mask in masks))
        return jnp.concatenate([jnp.broadcast_to(mask, (*shape, mask.shape[2])) for mask in masks], axis=2)


def merged(segments: Sequence[Segment]) -> list[Keys]:
    """The first segment is the long one (a cache, never copied); what follows is a few tokens and cheaper as one."""
    first, *rest = segments
    keys = [Keys(first.kv, [first])]
    if rest:
        parts = zip(*(each.kv for each in rest), strict=True)
        keys.append(Keys(rest[0].kv if len(rest) == 1 else LayerKV(*(jnp.concatenate(x, axis=2) for x in parts)), rest))
    return keys
