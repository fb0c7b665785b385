"""The decode loop: prefill, then rounds of propose, verify, accept, commit, all on the device.

    state = prefill(target, drafter, tree, prompt, request, capacity)
    state = decode(target, drafter, tree, state, max_rounds)      # until all rows are done, or a slice for streaming

Both are pure and jitted by the caller; whole generation and streaming run the same round. Every row has its own length,
seed, sampling parameters and stop state. The drafter is any object with the contract of `jaxspec.drafters.contract`,
or None for autoregressive decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import cache as caches
from jaxspec.drafters.contract import DrafterContext, DraftModel
from jaxspec.kernels.attention import LayerKV
from jaxspec.speculation.accept import accept
from jaxspec.speculation.logprobs import Logprobs, logprobs_if
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.penalties import penalised
from jaxspec.speculation.sampling import Noise, choose
from jaxspec.speculation.tree import Tree, TreeConfig, path_tokens, root_only
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.images import Array
from jaxspec.targets.prompts import PromptBatch

NO_TOKEN = -1
"""Stands in a tree for a draft token that shall not be accepted; the root is read in its place."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request(Generic[Array]):
    """What each row asks for."""

    sampling: BatchSampling
    max_new_tokens: Array  # i32 [B], at least 1
    stop_token_ids: Array  # i32 [B, K], -1 where unused
    logprobs: Array | None = None  # bool [B], rows whose log-probabilities are told; None where no row's are

    def counted(self, tokens: jax.Array, count: jax.Array) -> "Request":
        """The same after the first `count` i32 `[B]` of `tokens` i32 `[B, P]` were generated, which penalties count."""
        return dataclasses.replace(self, sampling=self.sampling.counted(tokens, count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The whole state of a batch between rounds."""

    cache: tuple[LayerKV, ...]
    lengths: jax.Array  # i32 [B], committed rows
    offset: jax.Array  # i32 [B], position of the root minus `lengths`: not 0 where images take fewer positions
    root: jax.Array  # i32 [B], last chosen token, not yet in the cache
    drafter: Any
    request: Request[jax.Array]
    tokens: jax.Array  # i32 [B, T], generated tokens
    from_draft: jax.Array  # bool [B, T], True where the drafter had proposed the token
    counts: jax.Array  # i32 [B], generated tokens so far
    done: jax.Array  # bool [B]
    alone: jax.Array  # bool [B], rows whose next round verifies the root without a draft (see `decode_round`)
    failed: jax.Array  # bool [B], rows that are done because the logits of their next token were not finite
    rounds: jax.Array  # i32 [B], verification steps
    logprobs: Logprobs[jax.Array] | None = None  # [B, T, ..] of the generated tokens, where a row asks for them


def taps_of(drafter: DraftModel | None) -> tuple[int, ...]:
    """The layers of the target whose outputs a drafter reads beside the final features."""
    return getattr(drafter, "tap_layers", ())


def read_prompts(
    target: VisionLanguageModel, prompt: PromptBatch[jax.Array], tap_layers: Sequence[int] = ()
) -> tuple[jax.Array, tuple[LayerKV, ...], jax.Array, jax.Array | None]:
    """The target's prefill: features `[B, S, (T + 1) * D]`, keys and values per layer, embeddings `[B, S, D]`, and what
    its tower saw (`[R, Dv]` or None)."""
    vision = None if prompt.images is None else target.encode_vision(prompt.images)
    embeds = target.embed(prompt.input_ids, prompt.images, vision)
    features, new_kv = target.prefill(embeds, prompt.lengths, prompt.images, prompt.position_ids, tap_layers)
    return features, new_kv, embeds, vision


def prefill(
    target: VisionLanguageModel,
    drafter: DraftModel | None,
    tree: TreeConfig,
    prompt: PromptBatch[jax.Array],
    request: Request[jax.Array],
    capacity: int,
    max_new: int,
) -> DecodeState:
    """Run the prompt, choose the first token, prepare the drafter.

    `capacity` rows hold the longest prompt plus its new tokens; `max_new` bounds `request.max_new_tokens`.
    """
    batch = prompt.input_ids.shape[0]
    with jax.named_scope("prefill"):
        features, new_kv, embeds, vision = read_prompts(target, prompt, taps_of(drafter))
    last = jnp.take_along_axis(features, (prompt.lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
    sampling = request.sampling
    logits = target.unembed(last)  # [B, 1, V]
    failed = ~finite(logits)[:, 0]
    noise = Noise(sampling.seed, prompt.lengths, logits.shape[-1])
    scores = logits if sampling.penalties is None else penalised(logits, sampling.penalties, 0)
    root = choose(scores, lambda: noise.levels(0, 1), sampling)[:, 0]
    counts = 1 - failed.astype(jnp.int32)
    first = told(request, ~failed, lambda: logits, root[:, None])  # [B, 1, ..]
    cache = tuple(caches.extend(kv, capacity) for kv in new_kv)
    drafter_state = None
    if drafter is not None:
        context = context_of(prompt, features, embeds, vision, prompt.lengths, sampling.seed, root)
        with jax.named_scope("draft_prefill"):
            drafter_state = drafter.prefill(target, context, capacity)
    return DecodeState(
        cache=cache,
        lengths=prompt.lengths,
        offset=position_offset(prompt),
        root=root,
        drafter=drafter_state,
        request=request.counted(root[:, None], counts),
        tokens=jnp.zeros((batch, max_new), jnp.int32).at[:, 0].set(root),
        from_draft=jnp.zeros((batch, max_new), bool),
        counts=counts,
        done=failed | is_stop(root[:, None], request)[:, 0] | (request.max_new_tokens <= 1),
        alone=jnp.zeros((batch,), bool),
        failed=failed,
        rounds=jnp.zeros((batch,), jnp.int32),
        logprobs=None if first is None else first.with_room(max_new),
    )


def context_of(
    prompt: PromptBatch[jax.Array],
    features: jax.Array,
    embeds: jax.Array,
    vision: jax.Array | None,
    prompt_lengths: jax.Array,
    seeds: jax.Array,
    root: jax.Array,
) -> DrafterContext:
    """What `read_prompts` gave, for the drafter."""
    return DrafterContext(
        embeds=embeds,
        features=features,
        vision=vision,
        vision_rows=None if prompt.images is None else prompt.images.rows,
        image_ids=prompt.image_ids,
        input_ids=prompt.input_ids,
        lengths=prompt.lengths,
        prompt_lengths=prompt_lengths,
        seeds=seeds,
        root=root,
        max_images=prompt.max_images,
        min_image_tokens=prompt.min_image_tokens,
    )


def decode(
    target: VisionLanguageModel,
    drafter: DraftModel | None,
    tree: TreeConfig,
    state: DecodeState,
    max_rounds: jax.Array,
) -> DecodeState:
    """Rounds until every row is done, at most `max_rounds` i32 []."""

    def unfinished(carry):
        rounds, state = carry
        return ~jnp.all(state.done) & (rounds < max_rounds)

    def body(carry):
        rounds, state = carry
        return rounds + 1, decode_round(target, drafter, tree, state)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def decode_round(
    target: VisionLanguageModel, drafter: DraftModel | None, config: TreeConfig, state: DecodeState
) -> DecodeState:
    """One verification of one tree; rows that are done stay as they are.

    A row whose logits are not finite on its accepted path emits nothing. A draft token may be to blame, accepted or not
    (its values reach its siblings through attention, where nothing times NaN is NaN), so the next round of that row
    verifies the root alone: what is still not finite is the target's own answer, and the row has failed.
    """
    sampling, room = state.request.sampling, config.max_depth + 1
    levels = jnp.arange(room)
    noise = Noise(sampling.seed, state.lengths + 1, target.config.text.vocab_size)
    drafter_state = state.drafter
    with jax.named_scope("propose"):
        if drafter is None:
            tree = root_only(state.root)
        else:
            tree, drafter_state = drafter.propose(target, config, drafter_state, state.root, noise, sampling)
            tree = tree._replace(tokens=jnp.where(state.alone[:, None] & (tree.depths > 0), NO_TOKEN, tree.tokens))
    with jax.named_scope("verify"):
        features, new_kv = verify(target, tree, state, taps_of(drafter))
        logits = scores = target.unembed(features)
        if sampling.penalties is not None:
            scores = penalised(logits, sampling.penalties, tree.depths, path_tokens(tree, config.max_depth))
        chosen = choose(scores, lambda: of_nodes(tree, noise.levels(0, room)), sampling)  # [B, N]
        accepted = accept(tree, chosen, config.max_depth)

        def path_logits() -> jax.Array:  # [B, P, V]
            return jnp.take_along_axis(logits, accepted.path[..., None], axis=1)

        logprobs = told(state.request, ~state.done, path_logits, accepted.tokens)  # [B, P, ..]
    with jax.named_scope("commit"):
        emit = emission(accepted.tokens, accepted.length, state)  # [B], 0 for rows that are done
        whole = jnp.take_along_axis(finite(logits), accepted.path, axis=1)  # [B, P]
        broken = jnp.any(~whole & (levels < emit[:, None]), axis=1)  # [B]
        emit = jnp.where(broken, 0, emit)
        cache = tuple(
            caches.write(old, caches.take(new, accepted.path), state.lengths, emit)
            for old, new in zip(state.cache, new_kv, strict=True)
        )
        if drafter is not None:
            path_features = jnp.take_along_axis(features, accepted.path[..., None], axis=1)  # [B, P, D]
            drafter_state = drafter.advance(target, drafter_state, accepted.tokens, path_features, emit)
    last = jnp.take_along_axis(accepted.tokens, jnp.maximum(emit - 1, 0)[:, None], axis=1)[:, 0]
    counts = state.counts + emit
    stopped = (emit > 0) & (is_stop(last[:, None], state.request)[:, 0] | (counts >= state.request.max_new_tokens))
    failed = broken & (state.alone | (config.total_tokens == 1))
    # Of an accepted path of `length` nodes, the first `length - 1` new tokens are the draft's, the last is the bonus.
    drafted = levels < (accepted.length - 1)[:, None]
    return DecodeState(
        cache=cache,
        lengths=state.lengths + emit,
        offset=state.offset,
        root=jnp.where(emit > 0, accepted.root, state.root),
        drafter=drafter_state,
        request=state.request.counted(accepted.tokens, emit),
        tokens=write_rows(state.tokens, accepted.tokens, state.counts),
        from_draft=write_rows(state.from_draft, drafted, state.counts),
        counts=counts,
        done=state.done | stopped | failed,
        alone=broken & ~failed,
        failed=state.failed | failed,
        rounds=state.rounds + ~state.done,
        logprobs=jax.tree.map(lambda old, new: write_rows(old, new, state.counts), state.logprobs, logprobs),
    )


def finish(state: DecodeState, rows: jax.Array | np.ndarray) -> DecodeState:
    """The same with `rows` bool `[B]` done: a stop string that the host found has ended them."""
    return dataclasses.replace(state, done=state.done | rows)


def verify(
    target: VisionLanguageModel, tree: Tree, state: DecodeState, tap_layers: Sequence[int] = ()
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """The target on all nodes of the tree at once: features `[B, N, (T + 1) * D]`, keys and values per layer."""
    positions = (state.lengths + state.offset)[:, None] + tree.depths
    cache_mask = caches.filled(state.lengths, state.cache[0].keys.shape[2])
    embeds = target.embed(jnp.where(tree.tokens == NO_TOKEN, tree.tokens[:, :1], tree.tokens))
    return target.forward(embeds, positions, tree.ancestors, state.cache, cache_mask, tap_layers)


def position_offset(prompt: PromptBatch[jax.Array]) -> jax.Array:
    """i32 `[B]`: how far the position of the first new token is from the length of the prompt."""
    if prompt.position_ids is None:
        return jnp.zeros_like(prompt.lengths)
    used = jnp.arange(prompt.input_ids.shape[1]) < prompt.lengths[:, None]  # [B, S]
    return jnp.max(jnp.where(used, prompt.position_ids, -1), axis=(0, 2)) + 1 - prompt.lengths


def finite(logits: jax.Array) -> jax.Array:
    """Bool `[B, N]`: logits `[B, N, V]` without NaN and infinity, of which some token is possible (-inf is legal)."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def emission(tokens: jax.Array, length: jax.Array, state: DecodeState) -> jax.Array:
    """How many of the path's tokens `[B, P]` become output: up to the first stop token and the row's limit."""
    stops = is_stop(tokens, state.request)  # [B, P]
    before_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, tokens.shape[1])
    limit = state.request.max_new_tokens - state.counts
    return jnp.where(state.done, 0, jnp.minimum(jnp.minimum(length, before_stop), limit))


def is_stop(tokens: jax.Array, request: Request[jax.Array]) -> jax.Array:
    """Bool `[B, P]` of tokens `[B, P]`."""
    return jnp.any(tokens[..., None] == request.stop_token_ids[:, None, :], axis=-1)


def of_nodes(tree: Tree, levels: jax.Array) -> jax.Array:
    """What `levels` `[B, P, V]` hold for the depth of each node, `[B, N, V]`."""
    return jnp.take_along_axis(levels, tree.depths[..., None], axis=1)


def told(
    request: Request[jax.Array], rows: jax.Array, logits: Callable[[], jax.Array], tokens: jax.Array
) -> Logprobs[jax.Array] | None:
    """Log-probabilities of tokens i32 `[B, P]` chosen from `logits()` `[B, P, V]`, where one of the `rows` bool `[B]`
    asks for them; None where no row of the batch ever does."""
    if request.logprobs is None:
        return None
    return logprobs_if(jnp.any(request.logprobs & rows), logits, tokens)


def write_rows(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    """`block` `[B, P, ..]` written into `buffer` `[B, T, ..]` at column `start` `[B]`; entries past T are dropped."""
    columns = start[:, None] + jnp.arange(block.shape[1])
    rows = jnp.arange(block.shape[0])[:, None]
    return buffer.at[rows, columns].set(block.astype(buffer.dtype), mode="drop")
