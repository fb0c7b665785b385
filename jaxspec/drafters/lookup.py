"""Prompt lookup: what followed the last few tokens when they occurred before is drafted again. No parameters.

Source: Saxena, "Prompt Lookup Decoding" (2023), also `prompt_lookup_num_tokens` of transformers. There the earliest
occurrence of the longest n-gram is taken and the draft ends with the text; ours is the latest occurrence, and a draft
that reaches the end of the text goes on with itself, so that a text which repeats itself is drafted at full length.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.cache import write_at
from jaxspec.drafters.contract import DrafterContext, Method
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import NO_TOKEN, Tree, TreeConfig, build_tree
from jaxspec.targets.contract import VisionLanguageModel

IMAGE = -1
"""Stands in a history for every image token: it matches nothing and is never drafted."""


@dataclasses.dataclass(frozen=True)
class LookupConfig:
    """`max_ngram`: the most tokens that are looked for; where they did not occur before, fewer are, down to
    `min_ngram`. A single token that occurred before says little: with `min_ngram` 2 more rounds go without a draft."""

    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {self.max_ngram}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram must be between 1 and max_ngram ({self.max_ngram}), got {self.min_ngram}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupState:
    history: jax.Array  # i32 [B, S], prompt and answer up to the root, IMAGE for image tokens
    lengths: jax.Array  # i32 [B]


class PromptLookup(nnx.Module):
    """A `jaxspec.drafters.contract.DraftModel` for chains."""

    may_abstain = True

    def __init__(self, config: LookupConfig = LookupConfig(), *, rngs: nnx.Rngs | None = None) -> None:
        del rngs
        self.config = config

    def check_tree(self, tree: TreeConfig) -> None:
        """Raises ValueError for a tree that is no chain."""
        if tree.top_k > 1:
            raise ValueError(f"prompt lookup drafts a chain: the tree's top_k must be 1, got {tree.top_k}")

    def prefill(self, model: VisionLanguageModel, context: DrafterContext, capacity: int) -> LookupState:
        prompt = jnp.where(context.image_ids >= 0, IMAGE, context.input_ids)
        history = jnp.pad(prompt, ((0, 0), (0, capacity - prompt.shape[1])))
        return LookupState(write_at(history, context.root[:, None], context.lengths), context.lengths + 1)

    def propose(
        self,
        model: VisionLanguageModel,
        config: TreeConfig,
        state: LookupState,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> Tree:
        draft = look_up(state.history, state.lengths, self.config, config.max_depth)
        tokens = jnp.concatenate([root[:, None], draft], axis=1)
        depths = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return build_tree(tokens, jnp.maximum(depths - 1, 0), depths, config.max_depth)

    def advance(
        self,
        model: VisionLanguageModel,
        state: LookupState,
        tokens: jax.Array,
        features: jax.Array,
        count: jax.Array,
    ) -> LookupState:
        return LookupState(write_at(state.history, tokens, state.lengths), state.lengths + count)


def look_up(history: jax.Array, lengths: jax.Array, config: LookupConfig, count: int) -> jax.Array:
    """i32 `[B, count]`: what follows the latest earlier occurrence of the longest n-gram that
    ends `history` i32 `[B, S]` of `lengths` i32 `[B]`; NO_TOKEN where nothing is found and from where an image begins.
    An occurrence before an image does not count."""
    capacity = history.shape[1]
    places = jnp.arange(capacity)
    # How many of the last tokens, counted backwards, are also the last ones at each place.
    matched, matches = jnp.zeros(history.shape, jnp.int32), jnp.ones(history.shape, bool)
    for back in range(config.max_ngram):
        wanted = jnp.take_along_axis(history, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)  # [B, 1]
        wanted = jnp.where((lengths > back)[:, None], wanted, IMAGE)
        there = jnp.pad(history, ((0, 0), (back, 0)), constant_values=IMAGE)[:, :capacity]
        matches &= (there == wanted) & (wanted != IMAGE)
        matched += matches
    follower = jnp.pad(history, ((0, 0), (0, 1)), constant_values=IMAGE)[:, 1:]
    usable = (matched >= config.min_ngram) & (places < (lengths - 1)[:, None]) & (follower != IMAGE)
    rank = jnp.where(usable, matched * capacity + places, -1)  # longest first, then latest
    best = jnp.argmax(rank, axis=1)[:, None]  # [B, 1]
    # Beyond the last token the draft goes on with itself.
    period = jnp.maximum(lengths[:, None] - 1 - best, 1)
    draft = jnp.take_along_axis(history, best + 1 + jnp.arange(count) % period, axis=1)
    real = usable.any(axis=1, keepdims=True) & jnp.cumprod(draft != IMAGE, axis=1, dtype=bool)
    return jnp.where(real, draft, NO_TOKEN)


LOOKUP = Method(
    title="Prompt lookup",
    module=PromptLookup,
    read_config=lambda raw: LookupConfig(**{name: raw[name] for name in ("max_ngram", "min_ngram") if name in raw}),
    write_config=dataclasses.asdict,
    tree=TreeConfig.chain(10),  # Saxena's notebook
    misfits=lambda config, target_config: [],
    without_folder=LookupConfig(),
)
