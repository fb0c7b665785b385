"""What a drafter must offer, and what there is to know of a method of drafting.

All methods of a `DraftModel` are pure; its state is any pytree and belongs to it. Beside the target's embedding and LM
head (frozen, shared), a drafter sees of the target only what `DrafterContext` holds. Some have more to say: one that
cannot draft every tree has `check_tree(tree)`, which raises ValueError and which a `Generator` asks before anything is
compiled; one that reads more of the target than its final features has `tap_layers`, a tuple of the layers whose
outputs stand before these, in `DrafterContext` and in `advance`; one that may have nothing to draft has `may_abstain =
True` and puts `NO_TOKEN` below the root of such a row: a round without a draft then costs an autoregressive one, for
the price of a second program of the target within the compiled one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxspec.checkpoints.names import NameTable
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import Tree, TreeConfig
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.prompts import static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrafterContext:
    """All a drafter ever sees of the target's prefill; in training, of its pass over prompts with their answers."""

    embeds: jax.Array  # [B, S, D], image features in place
    features: jax.Array  # [B, S, (T + 1) * D], the drafter's tap layers before the final features
    vision: jax.Array | None  # [R, Dv], the tower's features before the target's projector
    vision_rows: jax.Array | None  # i32 [B, S], the row of `vision` at each image token
    image_ids: jax.Array  # i32 [B, S], which image of its row a token belongs to, -1 for text
    input_ids: jax.Array  # i32 [B, S]
    lengths: jax.Array  # i32 [B]
    prompt_lengths: jax.Array  # i32 [B], without the answers
    seeds: jax.Array  # u32 [B], of the requests' sampling
    root: jax.Array  # i32 [B], the first token the target chose
    max_images: int = static(0)
    min_image_tokens: int = static(0)


class DraftModel(Protocol):
    """An nnx module with these methods."""

    config: Any
    """What it was built from, as of its `Method`."""

    def prefill(self, target: VisionLanguageModel, context: DrafterContext, capacity: int) -> Any:
        """The state after the prompt and the first chosen token; caches hold `capacity` positions."""

    def propose(
        self,
        target: VisionLanguageModel,
        config: TreeConfig,
        state: Any,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> tuple[Tree, Any]:
        """A tree whose root is `root` i32 `[B]`; `noise` is that of the tokens below it."""

    def advance(
        self, target: VisionLanguageModel, state: Any, tokens: jax.Array, features: jax.Array, count: jax.Array
    ) -> Any:
        """Take in what was accepted: `features` `[B, P, (T + 1) * D]` of the accepted nodes (root first) and the token
        `tokens` i32 `[B, P]` the target chose after each; `count` i32 `[B]` of them are real, 0 for finished rows."""


class Sizes(Protocol):
    """A config that tells what a drafter on the target's features and tokens must share with it."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of drafting, as the registry and drafter folders know it."""

    title: str
    """How tables call it."""
    module: Callable[..., DraftModel]
    """`module(config, rngs=)` is a fresh `DraftModel`."""
    read_config: Callable[[dict], Any]
    """The config that a folder's config.json means; where that names no `hidden_size` or `vocab_size` it is given the
    target's. Raises ValueError."""
    write_config: Callable[[Any], dict]
    """Its inverse."""
    tree: TreeConfig
    """The published tree, for folders that name none."""
    misfits: Callable[[Any, TargetConfig], list[str]]
    """`misfits(config, target's config)`: every way in which such a drafter cannot serve that target."""
    names: NameTable = NameTable(ignored=(r".*\.rotary_emb\.inv_freq",))
    """Our parameter paths <-> tensor names of its files."""
    complete_config: Callable[[Any, Mapping[str, np.ndarray]], Any] = lambda config, tensors: config
    """The config with what the folder's tensors (by published name) tell beyond config.json."""
    check_folder: Callable[[Path, Any], None] = lambda folder, tokenizer: None
    """`check_folder(folder, tokenizer of the target)`: raises ValueError where what else lies in it does not suit."""
    copies_embedding: bool = False
    """Its files hold a copy of the target's embedding, which tells what target they belong to."""
    without_folder: Any = None
    """The config of a method without parameters, which is loaded by its name alone."""


def size_misfits(ours: Sizes, theirs: TargetConfig) -> list[str]:
    """The sizes that a drafter's config does not share with the target's."""
    return [
        f"{name} {getattr(ours, name)} (target: {getattr(theirs.text, name)})"
        for name in ("hidden_size", "vocab_size")
        if getattr(ours, name) != getattr(theirs.text, name)
    ]
