"""The decode loop: rounds of propose, verify, accept, commit, all on the device.

    state = begin(model, draft_model, read, request, offset)      # of prompts that prefill.py has read
    state = decode(model, draft_model, state, max_rounds, tree)   # until all rows are done, or a slice for streaming

Both are pure and jitted by the caller (jaxspec/programs.py); whole generation and streaming run the same round, and
between two slices rows may come and go (state.py). Every row has its own length, seed, sampling parameters and stop
state, and answers as if it were alone. The draft model is any object with the contract of `jaxspec.drafters.contract`,
or None for autoregressive decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.cache import LayerKV, take, write_at
from jaxspec.drafters.contract import DraftModel
from jaxspec.kernels.masks import Mask
from jaxspec.speculation.accept import Accepted, accept
from jaxspec.speculation.logprobs import Logprobs, logprobs_if
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.penalties import penalised
from jaxspec.speculation.prefill import Read, context_of, nothing_read, taps_of, with_room
from jaxspec.speculation.sampling import Noise, allow, choose
from jaxspec.speculation.state import STOP_TOKENS, DecodeState, Request, placed
from jaxspec.speculation.tree import NO_TOKEN, Tree, TreeConfig, path_tokens, root_only
from jaxspec.targets.contract import VisionLanguageModel


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
    allowed: jax.Array | None = None,
) -> DecodeState:
    """The state after the first token of prompts that have been read: it is chosen, the drafter prepared.

    `offset` i32 `[B]` is the position of the first new token minus the length of its prompt, `capacity` the tokens of
    prompt and answer that there is room for, `max_images` a bound of the images in a prompt, `allowed` u32 `[B, 1, W]`
    the tokens that a grammar lets an answer begin with. Shapes depend on the batch, the capacity and the width of
    `request` alone.
    """
    lengths, sampling = read.cache.lengths, request.sampling
    batch = lengths.shape[0]
    logits = model.unembed(read.last[:, None])  # [B, 1, V]
    failed = ~finite(logits)[:, 0]
    noise = Noise(sampling.seed, lengths, logits.shape[-1])
    scores = logits if sampling.penalties is None else penalised(logits, sampling.penalties, 0)
    scores = scores if allowed is None else allow(scores, allowed)
    root = choose(scores, lambda: noise.levels(0, 1), sampling)[:, 0]
    counts = 1 - failed.astype(jnp.int32)
    first = told(request, ~failed, lambda: logits, root[:, None])  # [B, 1, ..]
    draft_state = None
    if draft_model is not None:
        with jax.named_scope("draft_prefill"):
            short = with_room(read, min(read.cache.capacity, capacity))
            draft_state = draft_model.prefill(model, context_of(short, sampling.seed, root, max_images), capacity)
    return DecodeState(
        cache=with_room(read, capacity).cache,
        offset=offset,
        root=root,
        draft_state=draft_state,
        request=request.counted(root[:, None], counts),
        tokens=jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(root),
        from_draft=jnp.zeros((batch, capacity), bool),
        counts=counts,
        done=failed | request.stops(root[:, None])[:, 0] | (request.max_new_tokens <= 1),
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
    stop_tokens: int = STOP_TOKENS,
    extras: bool = False,
) -> DecodeState:
    """A state whose rows are all done: slots that wait for rows. `stop_tokens` and `extras` are those of the requests
    to come (`Request.of`)."""

    def nothing() -> DecodeState:
        nobody, nothing_said = [SamplingParams()] * batch, [np.zeros(0, np.int32)] * batch
        asked = Request.of(nobody, nothing_said, [1] * batch, [-1] * stop_tokens, model.vocab_size, extras)
        request = jax.tree.map(jnp.asarray, asked)
        read = nothing_read(model, draft_model, batch, capacity)
        return begin(model, draft_model, read, request, jnp.zeros((batch,), jnp.int32), capacity)

    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(nothing))
    return dataclasses.replace(state, done=jnp.ones((batch,), bool))


def decode(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    max_rounds: jax.Array,
    tree: TreeConfig,
) -> DecodeState:
    """Rounds until every row is done, at most `max_rounds` i32 []."""

    def unfinished(carry):
        rounds, state = carry
        return ~jnp.all(state.done) & (rounds < max_rounds)

    def body(carry):
        rounds, state = carry
        return rounds + 1, decode_round(model, draft_model, tree, state)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def decode_undrafted(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    max_rounds: jax.Array,
    window: int,
) -> DecodeState:
    """Autoregressive rounds, at most `max_rounds` i32 [] of them and `window`, of a state whose drafter is to draft
    again later: it takes in all new tokens at once, after the last round."""
    if draft_model is None:
        return decode(model, None, state, jnp.minimum(max_rounds, window), TreeConfig.autoregressive())
    batch, width = state.done.shape[0], model.config.text.hidden_size * (len(taps_of(draft_model)) + 1)
    tokens = jnp.zeros((batch, window), jnp.int32)
    features = jnp.zeros((batch, window, width), model.dtype)

    def unfinished(carry):
        rounds, state, _ = carry
        return ~jnp.all(state.done) & (rounds < jnp.minimum(max_rounds, window))

    def body(carry):
        rounds, state, taken = carry
        state, new = confirm(model, draft_model, TreeConfig.autoregressive(), state, root_only(state.root))
        return rounds + 1, state, taken.and_then(new)

    nothing = Taken(tokens, features, jnp.zeros((batch,), jnp.int32))
    _, state, taken = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state, nothing))
    return taught(model, draft_model, state, taken)


def decode_round(
    model: VisionLanguageModel, draft_model: DraftModel | None, config: TreeConfig, state: DecodeState
) -> DecodeState:
    """One verification of one tree; rows that are done stay as they are."""
    tree = drafted(model, draft_model, config, state)
    state, taken = confirm(model, draft_model, config, state, tree)
    return taught(model, draft_model, state, taken)


def drafted(model: VisionLanguageModel, draft_model: DraftModel | None, config: TreeConfig, state: DecodeState) -> Tree:
    """The tree that the next round verifies."""
    sampling = state.request.sampling.of_rows(~state.done)
    noise = Noise(sampling.seed, state.lengths + 1, model.vocab_size)
    with jax.named_scope("propose"):
        if draft_model is None:
            return root_only(state.root)
        tree = draft_model.propose(model, config, state.draft_state, state.root, noise, sampling)
        return tree._replace(tokens=jnp.where(state.alone[:, None] & (tree.depths > 0), NO_TOKEN, tree.tokens))


def confirm(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    config: TreeConfig,
    state: DecodeState,
    tree: Tree,
    allowed: jax.Array | None = None,
) -> tuple[DecodeState, "Taken"]:
    """What the target makes of a tree: the state after the round, of which the drafter has not heard yet.

    Where a drafter may abstain and no row has a draft, the target reads the roots alone, in a branch of its own.

    A row whose logits are not finite on its accepted path emits nothing. A draft token may be to blame, accepted or not
    (its values reach its siblings through attention, where nothing times NaN is NaN), so the next round of that row
    verifies the root alone: what is still not finite is the target's own answer, and the row has failed.

    `allowed` u32 `[B, N, W]` are the tokens that a grammar lets follow each node, as bits (`sampling.allow`).
    """
    sampling, room = state.request.sampling.of_rows(~state.done), config.max_depth + 1
    levels = jnp.arange(room)
    noise = Noise(sampling.seed, state.lengths + 1, model.vocab_size)
    with jax.named_scope("verify"):

        def verified(tree: Tree) -> Verified:
            features, new_kv = verify(model, tree, state, taps_of(draft_model))
            logits = scores = model.unembed(features)
            depth = min(room, tree.tokens.shape[1])
            if sampling.penalties is not None:
                scores = penalised(logits, sampling.penalties, tree.depths, path_tokens(tree, depth - 1))
            if allowed is not None:
                scores = allow(scores, allowed)
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

        if getattr(draft_model, "may_abstain", False) and tree.tokens.shape[1] > 1 and allowed is None:
            drafts = (tree.tokens != NO_TOKEN) & (tree.depths > 0) & ~state.done[:, None]
            result = jax.lax.cond(jnp.any(drafts), verified, lambda _: verified(root_only(state.root)), tree)
        else:
            result = verified(tree)
        accepted = result.accepted
    with jax.named_scope("commit"):
        emit = state.emission(accepted.tokens, accepted.length)  # [B], 0 for rows that are done
        broken = jnp.any(~result.finite & (levels < emit[:, None]), axis=1)  # [B]
        emit = jnp.where(broken, 0, emit)
        cache = state.cache.append(result.kv, emit)
    last = jnp.take_along_axis(accepted.tokens, jnp.maximum(emit - 1, 0)[:, None], axis=1)[:, 0]
    counts = state.counts + emit
    stopped = (emit > 0) & (state.request.stops(last[:, None])[:, 0] | (counts >= state.request.max_new_tokens))
    failed = broken & (state.alone | (config.total_tokens == 1))
    # Of an accepted path of `length` nodes, the first `length - 1` new tokens are the draft's, the last is the bonus.
    from_draft = levels < (accepted.length - 1)[:, None]
    after = DecodeState(
        cache=cache,
        offset=state.offset,
        root=jnp.where(emit > 0, accepted.root, state.root),
        draft_state=state.draft_state,
        request=state.request.counted(accepted.tokens, emit),
        tokens=write_at(state.tokens, accepted.tokens, state.counts),
        from_draft=write_at(state.from_draft, from_draft, state.counts),
        counts=counts,
        done=state.done | stopped | failed,
        alone=broken & ~failed,
        failed=state.failed | failed,
        rounds=state.rounds + ~state.done,
        logprobs=jax.tree.map(lambda old, new: write_at(old, new, state.counts), state.logprobs, result.logprobs),
    )
    return placed(after), Taken(accepted.tokens, result.features, emit)


class Taken(NamedTuple):
    """What a drafter has yet to hear: of accepted nodes, root first."""

    tokens: jax.Array  # i32 [B, P], which token the target chose after each
    features: jax.Array  # [B, P, (T + 1) * D]
    count: jax.Array  # i32 [B], how many of them are real

    def and_then(self, new: "Taken") -> "Taken":
        """With `new` behind; P is as it was, and there must be room."""
        return Taken(
            write_at(self.tokens, new.tokens, self.count, new.count),
            write_at(self.features, new.features, self.count, new.count),
            self.count + new.count,
        )


def taught(model: VisionLanguageModel, draft_model: DraftModel | None, state: DecodeState, taken: Taken) -> DecodeState:
    """The state with a drafter that has heard of it."""
    if draft_model is None:
        return state
    with jax.named_scope("draft_advance"):
        draft_state = draft_model.advance(model, state.draft_state, taken.tokens, taken.features, taken.count)
    return dataclasses.replace(state, draft_state=placed(draft_state))


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
