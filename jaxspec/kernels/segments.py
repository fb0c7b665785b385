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


class Scores(NamedTuple):
    """How products of queries and keys become scores."""

    scale: float | None = None
    """What they are multiplied by; `Dh**-0.5` if not given."""
    soft_cap: float | None = None
    """What they stay below, `soft_cap * tanh(score / soft_cap)`; no bound if not given."""

    def factor(self, head_dim: int) -> float:
        """`scale` for heads of `head_dim` numbers."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def scores(self, products: jax.Array, head_dim: int) -> jax.Array:
        """Of products f32 of queries and keys of `head_dim` numbers."""
        return self.capped(products * self.factor(head_dim))

    def capped(self, scaled: jax.Array) -> jax.Array:
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)


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
