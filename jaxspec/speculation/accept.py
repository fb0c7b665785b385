"""Acceptance: which path of the tree the target would have generated itself.

The same rule at every temperature: a node is accepted iff its parent is and its token is the one the target chose at
its parent. No pointer walk: the ancestor matrix and one argmax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.speculation.tree import Tree


class Accepted(NamedTuple):
    path: jax.Array  # i32 [B, P], accepted node at each depth; entries past `length` repeat the last accepted node
    length: jax.Array  # i32 [B], accepted nodes, root included: 1..P
    tokens: jax.Array  # i32 [B, P], the target's token after each node of the path; `length` of them are new text
    root: jax.Array  # i32 [B], the last of those: the root of the next tree


def accept(tree: Tree, target_tokens: jax.Array, max_depth: int) -> Accepted:
    """`target_tokens` i32 `[B, N]` are the target's choices after each node; P = `max_depth + 1`."""
    parent_choice = jnp.take_along_axis(target_tokens, tree.parents, axis=1)  # [B, N]
    matches = (tree.tokens == parent_choice) | (tree.depths == 0)
    accepted = ~jnp.any(tree.ancestors & ~matches[:, None, :], axis=-1)  # [B, N]
    # Siblings differ, so the accepted nodes are one path, and its end is the deepest of them.
    last = jnp.argmax(jnp.where(accepted, tree.depths, -1), axis=1)  # [B]
    length = jnp.take_along_axis(tree.depths, last[:, None], axis=1)[:, 0] + 1
    on_path = jnp.take_along_axis(tree.ancestors, last[:, None, None], axis=1)  # [B, 1, N]
    levels = jnp.arange(max_depth + 1)
    at_level = on_path & (tree.depths[:, None, :] == levels[:, None])  # [B, P, N]
    path = jnp.where(levels < length[:, None], jnp.argmax(at_level, axis=-1), last[:, None]).astype(jnp.int32)
    tokens = jnp.take_along_axis(target_tokens, path, axis=1)
    root = jnp.take_along_axis(target_tokens, last[:, None], axis=1)[:, 0]
    return Accepted(path, length, tokens, root)
