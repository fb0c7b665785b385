"""What a drafter must offer, and what there is to know of a method of drafting.

Words: a `Target` and a `Drafter` are what their folders hold, loaded, with tokens, tree and records; the modules in
them, which compiled code sees, are `model` (a `VisionLanguageModel`) and `draft_model` (a `DraftModel`).

All methods of a `DraftModel` are pure. Beside the target's embedding and LM head (frozen, shared), a drafter sees of
the target only what `DrafterContext` holds. Its state is any pytree of arrays and belongs to it, on two conditions, so
that rows can come and go between rounds:

* every leaf leads with the batch, and no row of it depends on the rows beside it;
* shapes depend on the capacity and the batch alone, not on the prompt: a row that was read with an image takes the
  place of one that was read without.

Some have more to say: one that cannot draft every tree has `check_tree(tree)`, which raises ValueError and which a
`Generator` asks before anything is compiled; one that reads more of the target than its final features has
`tap_layers`, a tuple of the layers whose outputs stand before these, in `DrafterContext` and in `advance`; one that
reads what the tower saw before the target's projector has `reads_vision = True`; one that may have nothing to draft has
`may_abstain = True` and puts `NO_TOKEN` below the root of such a row: a round without a draft then costs an
autoregressive one, for the price of a second program of the target within the compiled one.

A context is made of as much as a method reads, here of tokens:

    >>> from jaxspec.drafters.contract import DrafterContext
    >>> from jaxspec.drafters.lookup import PromptLookup
    >>> context = DrafterContext.of(input_ids=[[5, 6, 7, 8, 5]], root=[6])
    >>> state = PromptLookup().prefill(None, context, capacity=8)
    >>> state.history.tolist(), state.lengths.tolist()
    ([[5, 6, 7, 8, 5, 6, 0, 0]], [6])
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from jaxspec.checkpoints.names import NameTable
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import Tree, TreeConfig
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.prompts import PromptBatch, static
from jaxspec.targets.reading import PromptPass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrafterContext:
    """All a drafter ever sees of the target's prefill; in training, of its pass over prompts with their answers."""

    embeds: jax.Array  # [B, S, D], image features in place
    features: jax.Array  # [B, S, (T + 1) * D], the drafter's tap layers before the final features
    vision: jax.Array | None  # [R, Dv], the tower's features before the target's projector
    vision_index: jax.Array | None  # i32 [B, S], which of these stands at each image token
    image_ids: jax.Array  # i32 [B, S], which image of its row a token belongs to, -1 for text
    input_ids: jax.Array  # i32 [B, S]
    lengths: jax.Array  # i32 [B]
    prompt_lengths: jax.Array  # i32 [B], without the answers
    seeds: jax.Array  # u32 [B], of the requests' sampling
    root: jax.Array  # i32 [B], the first token the target chose
    max_images: int = static(0)  # a bound of the images in a row
    min_image_tokens: int = static(0)  # a bound from below of the image tokens in every row

    @classmethod
    def of(
        cls,
        embeds: ArrayLike | None = None,
        features: ArrayLike | None = None,
        *,
        input_ids: ArrayLike | None = None,
        image_ids: ArrayLike | None = None,
        vision: ArrayLike | None = None,
        vision_index: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        prompt_lengths: ArrayLike | None = None,
        seeds: ArrayLike | None = None,
        root: ArrayLike | None = None,
        max_images: int | None = None,
        min_image_tokens: int = 0,
    ) -> "DrafterContext":
        """Of as much as a method reads; fields as above, lists and numpy's arrays are welcome.

        What is not given says: text only, rows of whole length without answers, tokens and seeds 0; embeddings and
        features then have no width. `max_images` is counted in `image_ids`; a function that is jitted must give it.

        Raises ValueError where neither embeddings nor features nor tokens are given, or they differ in `[B, S]`.
        """
        given = {"embeds": embeds, "features": features, "input_ids": input_ids, "image_ids": image_ids}
        sizes = {name: np.shape(array)[:2] for name, array in given.items() if array is not None}
        if not sizes:
            raise ValueError("a DrafterContext needs embeds, features or input_ids")
        (name, size), *others = sizes.items()
        for other, its_size in others:
            if its_size != size:
                raise ValueError(f"{other} are of [B, S] {list(its_size)}, {name} of {list(size)}")
        batch, length = size

        def whole(array: ArrayLike | None, shape: tuple[int, ...], value: int, dtype: DTypeLike) -> jax.Array:
            return jnp.full(shape, value, dtype) if array is None else jnp.asarray(array, dtype)

        nothing = jnp.zeros((batch, length, 0))
        real = whole(lengths, (batch,), length, jnp.int32)
        if max_images is None:
            max_images = 0 if image_ids is None else int(np.max(np.asarray(image_ids), initial=-1)) + 1
        return cls(
            embeds=nothing if embeds is None else jnp.asarray(embeds),
            features=nothing if features is None else jnp.asarray(features),
            vision=None if vision is None else jnp.asarray(vision),
            vision_index=None if vision_index is None else jnp.asarray(vision_index, jnp.int32),
            image_ids=whole(image_ids, size, -1, jnp.int32),
            input_ids=whole(input_ids, size, 0, jnp.int32),
            lengths=real,
            prompt_lengths=real if prompt_lengths is None else jnp.asarray(prompt_lengths, jnp.int32),
            seeds=whole(seeds, (batch,), 0, jnp.uint32),
            root=whole(root, (batch,), 0, jnp.int32),
            max_images=max_images,
            min_image_tokens=min_image_tokens,
        )

    @classmethod
    def of_pass(
        cls,
        prompts: PromptBatch[jax.Array],
        read: PromptPass,
        prompt_lengths: jax.Array,
        seeds: jax.Array,
        root: jax.Array,
    ) -> "DrafterContext":
        """From a target's pass over whole prompts (`jaxspec.targets.reading.read_prompts`)."""
        return cls(
            embeds=read.embeds,
            features=read.features,
            vision=read.vision,
            vision_index=None if prompts.images is None else prompts.images.index,
            image_ids=prompts.image_ids,
            input_ids=prompts.input_ids,
            lengths=prompts.lengths,
            prompt_lengths=prompt_lengths,
            seeds=seeds,
            root=root,
            max_images=prompts.max_images,
            min_image_tokens=prompts.min_image_tokens,
        )


class DraftModel(Protocol):
    """An nnx module with these methods; `model` is always the target's."""

    config: Any
    """What it was built from, as of its `Method`."""

    def prefill(self, model: VisionLanguageModel, context: DrafterContext, capacity: int) -> Any:
        """The state after the prompt and the first chosen token, for answers that end within `capacity` positions. The
        context has room for S tokens, at most `capacity`."""

    def propose(
        self,
        model: VisionLanguageModel,
        config: TreeConfig,
        state: Any,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> Tree:
        """A tree whose root is `root` i32 `[B]`; `noise` is that of the tokens below it."""

    def advance(
        self, model: VisionLanguageModel, state: Any, tokens: jax.Array, features: jax.Array, count: jax.Array
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
