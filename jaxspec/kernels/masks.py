"""Who sees whom, said by structure: filled lengths, order, windows, groups, ancestors.

A kernel reads the fields and skips what is not there; `Mask.visible` gives the same as bools, for a few queries at a
time, so that no array over all pairs of a long prompt exists (in the spirit of tokamax's `Mask`).
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which of S keys each of N queries sees: those for which every condition that is given holds. `Mask()` is all.

    Order and window count places; where none are given, query i and key i stand at place i.
    """

    lengths: jax.Array | None = None
    """i32 `[B]`: only the first so many keys are filled."""
    query_places: jax.Array | None = None
    """i32 `[B, N]`."""
    key_places: jax.Array | None = None
    """i32 `[B, S]`."""
    groups: jax.Array | None = None
    """i32 `[B, N]`, of tokens that are queries and keys at once: under `causal`, those of one group >= 0 see each other
    in both directions (the tokens of an image in Gemma3)."""
    ancestors: jax.Array | None = None
    """Bool `[B, N, S]`, or `[S, S]` of every row: the nodes of a tree that lie on a query's path, itself included."""
    dense: jax.Array | None = None
    """Bool `[B, N, S]` or `[B, 1, S]`: whatever nothing else says."""
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    """No key behind the query's place."""
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    """How far back from its place a query sees, itself included."""

    def visible(self, queries: jax.Array, keys: int) -> jax.Array:
        """Bool `[B or 1, n or 1, S]`: which of all S = `keys` the queries of these numbers i32 `[n]` see. A number past
        the last query counts as the last."""

        def of_queries(x: jax.Array) -> jax.Array:
            return jnp.take(x, queries, axis=1, mode="clip")

        seen = self.of_keys(queries, jnp.arange(keys))
        if self.ancestors is not None:
            seen = seen & of_queries(self.ancestors if self.ancestors.ndim == 3 else self.ancestors[None])
        if self.dense is not None:
            seen = seen & (self.dense if self.dense.shape[1] == 1 else of_queries(self.dense))
        return seen

    def of_keys(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """The same of the keys with these numbers i32 `[K]` alone, by everything but `ancestors` and `dense`."""

        def of_queries(x: jax.Array) -> jax.Array:
            return jnp.take(x, queries, axis=1, mode="clip")

        seen = jnp.ones((1, 1, len(keys)), bool)
        if self.causal or self.window is not None:
            places = queries[None] if self.query_places is None else of_queries(self.query_places)
            others = keys[None] if self.key_places is None else jnp.take(self.key_places, keys, axis=1)
            back = places[:, :, None] - others[:, None, :]  # [B or 1, n, S]
            if self.causal:
                seen = back >= 0
                if self.groups is not None:
                    own = of_queries(self.groups)[:, :, None]
                    seen = seen | ((own == jnp.take(self.groups, keys, axis=1)[:, None, :]) & (own >= 0))
            if self.window is not None:
                seen = seen & (back < self.window)
        if self.lengths is not None:
            seen = seen & (keys < self.lengths[:, None])[:, None, :]
        return seen
