"""What a drafter must offer, and what there is to know of a method of drafting.

All methods of a `DraftModel` are pure; its state is any pytree and belongs to it. Beside the target's embedding and LM
head (frozen, shared), a drafter sees of the target only what `DrafterContext` holds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx

from jaxspec.checkpoints.names import NameTable
from jaxspec.speculation.loop import DrafterContext
from jaxspec.speculation.sampling import BatchSampling
from jaxspec.speculation.tree import Tree, TreeConfig


class DraftModel(Protocol):
    tap_layers: tuple[int, ...] = ()
    """Layers of the target whose outputs stand before the final features, in `DrafterContext` and in `advance`; may be
    left out."""

    def prefill(self, target, context: DrafterContext, capacity: int) -> Any:
        """The state after the prompt and the first chosen token; caches hold `capacity` positions."""

    def propose(
        self, target, config: TreeConfig, state: Any, root: jax.Array, noise: jax.Array, sampling: BatchSampling
    ) -> tuple[Tree, Any]:
        """A tree whose root is `root` i32 `[B]`; `noise` f32 `[B, max_depth + 1, V]` of the depths below it."""

    def advance(self, target, state: Any, tokens: jax.Array, features: jax.Array, count: jax.Array) -> Any:
        """Take in what was accepted: `features` `[B, P, (T + 1) * D]` of the accepted nodes (root first) and the token
        `tokens` i32 `[B, P]` the target chose after each; `count` i32 `[B]` of them are real, 0 for finished rows."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of drafting, as the registry and drafter folders know it."""

    title: str
    """How tables call it."""
    module: Callable[..., nnx.Module]
    """`module(config, rngs=)` is a fresh `DraftModel`."""
    read_config: Callable[[dict], Any]
    """The config that a folder's config.json means. Raises ValueError."""
    write_config: Callable[[Any], dict]
    """Its inverse."""
    tree: TreeConfig
    """The published tree, for folders that name none."""
    misfits: Callable[[Any, Any], list[str]]
    """`misfits(config, target's config)`: every way in which such a drafter cannot serve that target."""
    names: NameTable = NameTable(ignored=(r".*\.rotary_emb\.inv_freq",))
    """Our parameter paths <-> tensor names of its files."""
    copies_embedding: bool = False
    """Its files hold a copy of the target's embedding, which tells what target they belong to."""
