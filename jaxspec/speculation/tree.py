"""Token trees of fixed size: their settings, their arrays, and how a drafter's candidates become one.

A tree is N nodes in an order in which parents come first; node 0 is the root, the last token the target chose. A chain
is the tree with `top_k = 1`, autoregressive decoding the tree of one node.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxspec.checks import real_number, whole_number
from jaxspec.speculation.filters import draft_floor, scale
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.penalties import penalised
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.vocabulary import largest, largest_tokens

Carry = TypeVar("Carry")

NO_TOKEN = -1
"""Stands in a tree for a draft token that shall not be accepted; the root is read in its place."""


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """Settings of a dynamic draft tree, named and counted as in the published code of EAGLE-2 and ViSpec.

    depth: how many times the frontier is expanded after the first level, so a path has up to `depth + 1` draft tokens.
    top_k: tokens per expanded node, and nodes per frontier.
    total_tokens: nodes kept, root included; 1 is autoregressive decoding.
    noise_weight: how much of the target's sampling noise (see sampling.py) the drafter adds to its own logits when it
      ranks candidates at temperature > 0: 1 for a drafter as sharp as its target, less for a flatter one, 0 for
      drafting without the noise.

    Raises ValueError for values a tree cannot have.
    """

    depth: int
    top_k: int
    total_tokens: int
    noise_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("top_k", 1), ("total_tokens", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        object.__setattr__(self, "noise_weight", real_number("noise_weight", self.noise_weight))
        if self.total_tokens > self.num_candidates + 1:
            raise ValueError(
                f"total_tokens must lie in 1..{self.num_candidates + 1}, all that a tree of depth {self.depth} and "
                f"top_k {self.top_k} can hold, got {self.total_tokens}"
            )
        if not 0 <= self.noise_weight <= 1:
            raise ValueError(f"noise_weight must lie in 0..1, got {self.noise_weight}")

    @classmethod
    def chain(cls, num_speculative_tokens: int, **options: float) -> "TreeConfig":
        """A chain of that many draft tokens (the root not counted)."""
        num_speculative_tokens = whole_number("num_speculative_tokens", num_speculative_tokens, 1)
        return cls(num_speculative_tokens - 1, 1, num_speculative_tokens + 1, **options)

    @classmethod
    def autoregressive(cls) -> "TreeConfig":
        """The tree of one node: every round emits the target's next token."""
        return cls(0, 1, 1)

    @property
    def num_candidates(self) -> int:
        return self.top_k + self.depth * self.top_k**2

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node the tree can have: the most draft tokens a round can accept."""
        return min(self.depth + 1, self.total_tokens - 1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where a node cannot have `top_k` different children."""
        if self.top_k > vocab_size:
            raise ValueError(f"top_k ({self.top_k}) is larger than the vocabulary ({vocab_size})")


class Tree(NamedTuple):
    """A batch of trees. Parents come before children; `parents` of the root is 0; a node of `NO_TOKEN` is no draft."""

    tokens: jax.Array  # i32 [B, N]
    parents: jax.Array  # i32 [B, N]
    depths: jax.Array  # i32 [B, N]
    ancestors: jax.Array  # bool [B, N, N], [.., i, :] marks the ancestors of node i and itself


@jax.named_scope("tree")
def build_tree(tokens: jax.Array, parents: jax.Array, depths: jax.Array, max_depth: int) -> Tree:
    """A tree from its parent links, i32 `[B, N]` each; `max_depth` bounds `depths`."""
    nodes = tokens.shape[1]
    reach = (parents[..., None] == jnp.arange(nodes)) | jnp.eye(nodes, dtype=bool)  # one step up, or none
    steps = 1
    while steps < max_depth:
        reach = jnp.einsum("bij,bjk->bik", reach.astype(jnp.float32), reach.astype(jnp.float32)) > 0
        steps *= 2
    # The root is its own parent here; every node reaches it.
    return Tree(tokens, parents, depths, reach)


def root_only(root: jax.Array) -> Tree:
    """The tree of autoregressive decoding, from the last tokens i32 `[B]`."""
    zeros = jnp.zeros((root.shape[0], 1), jnp.int32)
    return Tree(root[:, None], zeros, zeros, jnp.ones((root.shape[0], 1, 1), bool))


@jax.named_scope("tree")
def path_tokens(tree: Tree, max_depth: int) -> jax.Array:
    """The tokens on each node's path, i32 `[B, N, P]`: at place d that of depth d + 1, the node's own included, the
    root's left out; -1 behind the node. P is `max_depth`, or less where there are fewer nodes."""
    max_depth = min(max_depth, tree.tokens.shape[1] - 1)
    depths = jnp.where(tree.ancestors, tree.depths[:, None], 0)  # [B, N, N], of a node's ancestors
    at_depth = depths[:, :, None] == jnp.arange(1, max_depth + 1)[:, None]  # [B, N, P, N]
    return jnp.max(jnp.where(at_depth, tree.tokens[:, None, None], -1), axis=-1, initial=-1)


@jax.named_scope("choice")
def draft_children(
    config: TreeConfig,
    logits: jax.Array,
    level: int,
    noise: Noise,
    sampling: BatchSampling,
    vocabulary: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `top_k` best next tokens of every node: scores f32 and tokens i32 `[B, k, top_k]`, from logits `[B, k, V]`.

    A score is how much the drafter believes the target will choose the token. At temperature 0 it is the draft
    log-probability, as published. At other temperatures the target will choose `argmax(scaled + noise)` among what the
    filters keep; the drafter ranks by its own logits plus the same noise, as log-probabilities so that scores add up
    along a path, and takes for removed what the filters would remove from its own most probable tokens
    (`draft_floor`). The noise has the weight w = `config.noise_weight`: where the target's logits are the draft's
    divided by w (a drafter that is too flat), `draft + w * noise` orders the tokens as the target does. Penalties
    are the row's, without what a node's own path adds to them. `level` counts from 0 for the children of the root;
    `vocabulary` says which tokens the logits are of.
    """

    def greedy(logits: jax.Array) -> jax.Array:
        return logits

    def sampled(logits: jax.Array) -> jax.Array:
        scaled = scores = scale(logits, sampling)
        if config.noise_weight:
            scores = scaled + config.noise_weight * noise.levels(level, 1, vocabulary)
        scores = jnp.where(scaled >= draft_floor(scaled, sampling)[..., None], scores, -jnp.inf)
        return jnp.where((sampling.temperature > 0)[:, None, None], scores, scaled)

    logits = logits.astype(jnp.float32)
    if sampling.penalties is not None:
        own = sampling.penalties if vocabulary is None else sampling.penalties.among(vocabulary)
        logits = penalised(logits, own, level)
    scores = jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, greedy, logits)
    best, places = largest_tokens(scores, config.top_k)
    best = best - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # A child must never score higher than its parent, whatever rounding and odd logits do.
    best = jnp.minimum(jnp.nan_to_num(best, nan=-jnp.inf, posinf=0.0, neginf=-jnp.inf), 0.0)
    return best, (places if vocabulary is None else vocabulary[places]).astype(jnp.int32)


def grow_tree(
    config: TreeConfig,
    root: jax.Array,
    first_logits: jax.Array,
    noise: Noise,
    sampling: BatchSampling,
    expand: Callable[[Carry, jax.Array, jax.Array, int], tuple[Carry, jax.Array]],
    carry: Carry,
    vocabulary: jax.Array | None = None,
) -> Tree:
    """EAGLE-2's dynamic tree (arXiv 2406.16858, section 4) over any drafter.

    Args:
      root: i32 `[B]`.
      first_logits: `[B, V]`, the drafter's logits after the root.
      noise: of the tokens after the root.
      expand: `(carry, tokens [B, k], parent [B, k], level) -> (carry, logits [B, k, V])` runs the drafter on the
        frontier of depth `level + 1`; `parent` is each node's place in the frontier before (zeros at level 0). Logits
        `[B, 1, V]` hold for all nodes of the frontier.
      carry: whatever `expand` hands from level to level.
      vocabulary: i32 `[Vd]`, the tokens that the drafter's logits `[.., Vd]` are of, where they are not of all V.
    """
    if config.total_tokens == 1:
        return root_only(root)
    batch, k = root.shape[0], config.top_k
    levels = config.max_depth
    first = draft_children(config, first_logits[:, None], 0, noise, sampling, vocabulary)
    frontier_scores, frontier = (part[:, 0] for part in first)  # [B, k]
    parent = jnp.zeros((batch, k), jnp.int32)  # place in the frontier before
    ids = jnp.broadcast_to(jnp.arange(1, k + 1), (batch, k))  # number among all candidates; the root is 0
    all_tokens, all_scores, all_parents = [frontier], [frontier_scores], [parent]
    for level in range(levels - 1):
        carry, logits = expand(carry, frontier, parent, level)
        scores, tokens = draft_children(config, logits, level + 1, noise, sampling, vocabulary)  # [B, k or 1, k]
        child_scores = (scores + frontier_scores[..., None]).reshape(batch, k * k)
        child_tokens = jnp.broadcast_to(tokens, (batch, k, k)).reshape(batch, k * k)
        all_tokens.append(child_tokens)
        all_scores.append(child_scores)
        all_parents.append(jnp.repeat(ids, k, axis=1))
        frontier_scores, chosen = largest(child_scores, k)
        frontier = jnp.take_along_axis(child_tokens, chosen, axis=1)
        parent = chosen // k
        ids = 1 + k + level * k * k + chosen
    tokens, scores, parents = (jnp.concatenate(parts, axis=1) for parts in (all_tokens, all_scores, all_parents))
    # A child never scores higher than its parent and comes later, so the best nodes form a tree if of equal ones the
    # first are taken: a stable sort, since the order of ties in `top_k` is each backend's own.
    kept = jnp.argsort(-scores, axis=1, stable=True)[:, : config.total_tokens - 1]
    kept = jnp.sort(kept, axis=1)  # [B, N - 1]
    kept_parents = jnp.take_along_axis(parents, kept, axis=1)
    node_of_parent = 1 + jnp.argmax((kept + 1)[:, None, :] == kept_parents[..., None], axis=-1)
    depths = jnp.where(kept < k, 1, 2 + (kept - k) // (k * k))

    def with_root(first, rest):
        return jnp.concatenate([first[:, None], rest.astype(jnp.int32)], axis=1)

    zero = jnp.zeros((batch,), jnp.int32)
    return build_tree(
        with_root(root, jnp.take_along_axis(tokens, kept, axis=1)),
        with_root(zero, jnp.where(kept_parents == 0, 0, node_of_parent)),
        with_root(zero, depths),
        levels,
    )
