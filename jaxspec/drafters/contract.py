"""What a drafter must offer. All methods are pure; the state is any pytree and belongs to the drafter.

Beside the target's embedding and LM head (frozen, shared), a drafter sees of the target only what `DrafterContext`
holds: prompt embeddings, features, image spans.
"""

from typing import Any, Protocol

import jax

from jaxspec.speculation.loop import DrafterContext
from jaxspec.speculation.sampling import BatchSampling
from jaxspec.speculation.tree import Tree, TreeConfig


class DraftModel(Protocol):
    def prefill(self, target, context: DrafterContext, capacity: int) -> Any:
        """The state after the prompt and the first chosen token; caches hold `capacity` positions."""

    def propose(
        self, target, config: TreeConfig, state: Any, root: jax.Array, noise: jax.Array, sampling: BatchSampling
    ) -> tuple[Tree, Any]:
        """A tree whose root is `root` i32 `[B]`; `noise` f32 `[B, max_depth + 1, V]` of the depths below it."""

    def advance(self, target, state: Any, tokens: jax.Array, features: jax.Array, count: jax.Array) -> Any:
        """Take in what was accepted: `features` `[B, P, D]` of the accepted nodes (root first) and the token
        `tokens` i32 `[B, P]` the target chose after each; `count` i32 `[B]` of them are real, 0 for finished rows."""
