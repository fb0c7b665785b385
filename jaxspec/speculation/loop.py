"""The decode loop: rounds of propose, verify, accept, commit, all on the device.

    state = begin(model, draft_model, read, request, offset)      # of prompts that prefill.py has read
    state = decode(model, draft_model, tree, state, max_rounds)   # until all rows are done, or a slice for streaming
    state = insert(state, slots, rows)                            # rows of another state take the place of some
    state = finish(state, rows)                                   # and some are done because the host says so

All are pure and jitted by the caller (jaxspec/programs.py); whole generation and streaming run the same round. Every
row has its own length, seed, sampling parameters and stop state, and answers as if it were alone. The draft model
is any object with the contract of `jaxspec.drafters.contract`, or None for autoregressive decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.cache import Cache, LayerKV, take, write_at
from jaxspec.drafters.contract import DraftModel
from jaxspec.kernels.masks import Mask
from jaxspec.speculation.accept import Accepted, accept
from jaxspec.speculation.logprobs import Logprobs, logprobs_if
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.penalties import Penalties, penalised
from jaxspec.speculation.prefill import Read, context_of, nothing_read, taps_of
from jaxspec.speculation.sampling import Noise, choose
from jaxspec.speculation.tree import NO_TOKEN, Tree, TreeConfig, path_tokens, root_only
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.images import Array


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
    """The whole state of a batch between rounds: B slots, each a row of every leaf."""

    cache: Cache
    offset: jax.Array  # i32 [B], position of the root minus `lengths`: not 0 where images take fewer positions
    root: jax.Array  # i32 [B], last chosen token, not yet in the cache
    draft_state: Any  # what the draft model keeps of each row, as its contract says; None without one
    request: Request[jax.Array]
    tokens: jax.Array  # i32 [B, S], generated tokens; S is the capacity of the cache
    from_draft: jax.Array  # bool [B, S], True where the drafter had proposed the token
    counts: jax.Array  # i32 [B], generated tokens so far
    done: jax.Array  # bool [B]
    alone: jax.Array  # bool [B], rows whose next round verifies the root without a draft (see `decode_round`)
    failed: jax.Array  # bool [B], rows that are done because the logits of their next token were not finite
    rounds: jax.Array  # i32 [B], verification steps
    logprobs: Logprobs[jax.Array] | None = None  # [B, T, ..] of the generated tokens, where a row asks for them

    @property
    def lengths(self) -> jax.Array:
        """Committed tokens, i32 `[B]`."""
        return self.cache.lengths


class Verified(NamedTuple):
    """What a round learns from the target: of the accepted path, of P entries."""

    accepted: Accepted
    finite: jax.Array  # bool [B, P], whether a node's logits are
    features: jax.Array  # [B, P, (T + 1) * D]
    kv: tuple[LayerKV, ...]  # per layer, [B, Hkv, P, Dh]
    logprobs: Logprobs[jax.Array] | None  # [B, P, ..]


def begin(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    read: Read,
    request: Request[jax.Array],
    offset: jax.Array,
    capacity: int,
    max_images: int = 0,
) -> DecodeState:
    """The state after the first token of prompts that have been read: it is chosen, the drafter prepared.

    `offset` i32 `[B]` is the position of the first new token minus the length of its prompt, `capacity` the tokens of
    prompt and answer that there is room for, `max_images` a bound of the images in a prompt. Shapes depend on the
    batch, the capacity and the width of `request` alone.
    """
    lengths, sampling = read.cache.lengths, request.sampling
    batch = lengths.shape[0]
    logits = model.unembed(read.last[:, None])  # [B, 1, V]
    failed = ~finite(logits)[:, 0]
    noise = Noise(sampling.seed, lengths, logits.shape[-1])
    scores = logits if sampling.penalties is None else penalised(logits, sampling.penalties, 0)
    root = choose(scores, lambda: noise.levels(0, 1), sampling)[:, 0]
    counts = 1 - failed.astype(jnp.int32)
    first = told(request, ~failed, lambda: logits, root[:, None])  # [B, 1, ..]
    draft_state = None
    if draft_model is not None:
        with jax.named_scope("draft_prefill"):
            draft_state = draft_model.prefill(model, context_of(read, sampling.seed, root, max_images), capacity)
    return DecodeState(
        cache=Cache.of_prompt(read.cache.layers, lengths, capacity),
        offset=offset,
        root=root,
        draft_state=draft_state,
        request=request.counted(root[:, None], counts),
        tokens=jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(root),
        from_draft=jnp.zeros((batch, capacity), bool),
        counts=counts,
        done=failed | is_stop(root[:, None], request)[:, 0] | (request.max_new_tokens <= 1),
        alone=jnp.zeros((batch,), bool),
        failed=failed,
        rounds=jnp.zeros((batch,), jnp.int32),
        logprobs=None if first is None else first.with_room(capacity),
    )


def idle(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    batch: int,
    capacity: int,
    stop_tokens: int,
    penalties: bool = False,
    logprobs: bool = False,
) -> DecodeState:
    """A state whose rows are all done: slots that wait for rows. `stop_tokens` is the width of the requests to come;
    `penalties` and `logprobs` say whether these have room for such, used or not."""

    def nothing() -> DecodeState:
        params = [SamplingParams()] * batch
        asked = None
        if penalties:
            ids, stops = [np.zeros(0, np.int32)] * batch, [()] * batch
            asked = Penalties.from_params(params, ids, stops, model.vocab_size)
        request = Request(
            BatchSampling.from_params(params, asked),
            jnp.ones((batch,), jnp.int32),
            jnp.full((batch, stop_tokens), -1, jnp.int32),
            jnp.zeros((batch,), bool) if logprobs else None,
        )
        read = nothing_read(model, draft_model, batch, capacity)
        return begin(model, draft_model, read, request, jnp.zeros((batch,), jnp.int32), capacity)

    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(nothing))
    return dataclasses.replace(state, done=jnp.ones((batch,), bool))


def insert(state: DecodeState, slots: jax.Array, rows: DecodeState) -> DecodeState:
    """`state` with the n rows of another one in its `slots` i32 `[n]`, whatever stood there; a slot that is not there
    takes none. Both have the same capacity, the same width of stop tokens, and room for the same extras."""
    return jax.tree.map(lambda whole, new: whole.at[slots].set(new, mode="drop"), state, rows)


def decode(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
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
        return rounds + 1, decode_round(model, draft_model, tree, state)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def decode_round(
    model: VisionLanguageModel, draft_model: DraftModel | None, config: TreeConfig, state: DecodeState
) -> DecodeState:
    """One verification of one tree; rows that are done stay as they are.

    Where a drafter may abstain and no row has a draft, the target reads the roots alone, in a branch of its own.

    A row whose logits are not finite on its accepted path emits nothing. A draft token may be to blame, accepted or not
    (its values reach its siblings through attention, where nothing times NaN is NaN), so the next round of that row
    verifies the root alone: what is still not finite is the target's own answer, and the row has failed.
    """
    sampling, room = of_rows(state.request.sampling, ~state.done), config.max_depth + 1
    levels = jnp.arange(room)
    noise = Noise(sampling.seed, state.lengths + 1, model.vocab_size)
    draft_state = state.draft_state
    with jax.named_scope("propose"):
        if draft_model is None:
            tree = root_only(state.root)
        else:
            tree, draft_state = draft_model.propose(model, config, draft_state, state.root, noise, sampling)
            tree = tree._replace(tokens=jnp.where(state.alone[:, None] & (tree.depths > 0), NO_TOKEN, tree.tokens))
    with jax.named_scope("verify"):

        def verified(tree: Tree) -> Verified:
            features, new_kv = verify(model, tree, state, taps_of(draft_model))
            logits = scores = model.unembed(features)
            depth = min(room, tree.tokens.shape[1])
            if sampling.penalties is not None:
                scores = penalised(logits, sampling.penalties, tree.depths, path_tokens(tree, depth - 1))
            chosen = choose(scores, lambda: of_nodes(tree, noise.levels(0, depth)), sampling)  # [B, N]
            accepted = accept(tree, chosen, config.max_depth)

            def on_path(x: jax.Array) -> jax.Array:  # [B, N, ..] -> [B, P, ..]
                return jnp.take_along_axis(x, accepted.path.reshape(*accepted.path.shape, *[1] * (x.ndim - 2)), axis=1)

            return Verified(
                accepted,
                finite=on_path(finite(logits)),
                features=on_path(features),
                kv=take(new_kv, accepted.path),
                logprobs=told(state.request, ~state.done, lambda: on_path(logits), accepted.tokens),
            )

        if getattr(draft_model, "may_abstain", False):
            drafts = (tree.tokens != NO_TOKEN) & (tree.depths > 0) & ~state.done[:, None]
            result = jax.lax.cond(jnp.any(drafts), verified, lambda _: verified(root_only(state.root)), tree)
        else:
            result = verified(tree)
        accepted = result.accepted
    with jax.named_scope("commit"):
        emit = emission(accepted.tokens, accepted.length, state)  # [B], 0 for rows that are done
        broken = jnp.any(~result.finite & (levels < emit[:, None]), axis=1)  # [B]
        emit = jnp.where(broken, 0, emit)
        cache = state.cache.append(result.kv, emit)
        if draft_model is not None:
            draft_state = draft_model.advance(model, draft_state, accepted.tokens, result.features, emit)
    last = jnp.take_along_axis(accepted.tokens, jnp.maximum(emit - 1, 0)[:, None], axis=1)[:, 0]
    counts = state.counts + emit
    stopped = (emit > 0) & (is_stop(last[:, None], state.request)[:, 0] | (counts >= state.request.max_new_tokens))
    failed = broken & (state.alone | (config.total_tokens == 1))
    # Of an accepted path of `length` nodes, the first `length - 1` new tokens are the draft's, the last is the bonus.
    drafted = levels < (accepted.length - 1)[:, None]
    return DecodeState(
        cache=cache,
        offset=state.offset,
        root=jnp.where(emit > 0, accepted.root, state.root),
        draft_state=draft_state,
        request=state.request.counted(accepted.tokens, emit),
        tokens=write_at(state.tokens, accepted.tokens, state.counts),
        from_draft=write_at(state.from_draft, drafted, state.counts),
        counts=counts,
        done=state.done | stopped | failed,
        alone=broken & ~failed,
        failed=state.failed | failed,
        rounds=state.rounds + ~state.done,
        logprobs=jax.tree.map(lambda old, new: write_at(old, new, state.counts), state.logprobs, result.logprobs),
    )


def finish(state: DecodeState, rows: jax.Array | np.ndarray) -> DecodeState:
    """The same with `rows` bool `[B]` done: a stop string that the host found has ended them."""
    return dataclasses.replace(state, done=state.done | rows)


def of_rows(sampling: BatchSampling, rows: jax.Array) -> BatchSampling:
    """What the rows bool `[B]` ask for; the others cost what greedy ones do."""
    penalties = sampling.penalties
    if penalties is not None:
        penalties = dataclasses.replace(penalties, used=penalties.used & rows)
    temperature = jnp.where(rows, sampling.temperature, 0.0)
    return dataclasses.replace(sampling, temperature=temperature, penalties=penalties)


def verify(
    model: VisionLanguageModel, tree: Tree, state: DecodeState, tap_layers: Sequence[int] = ()
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """The target on all nodes of the tree at once: features `[B, N, (T + 1) * D]`, keys and values per layer."""
    positions = (state.lengths + state.offset)[:, None] + tree.depths
    embeds = model.embed(jnp.where(tree.tokens == NO_TOKEN, tree.tokens[:, :1], tree.tokens))
    return model.forward(embeds, positions, Mask(ancestors=tree.ancestors), state.cache, tap_layers)


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
