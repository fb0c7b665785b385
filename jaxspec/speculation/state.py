"""What a batch is between rounds, and how its rows come and go.

    state = insert(state, slots, rows)  # rows of another state take the place of some
    state = finish(state, rows)         # and some are done because the host says so
    state = moved(state, index)         # more slots, or fewer
    report(state, seen, width, ..)      # what has been said since the last look

A `DecodeState` has a slot for each of B rows. Its shapes depend on the batch, the capacity and the width of the
requests alone, so a row that `begin` (loop.py) has made elsewhere fits any slot.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.cache import Cache, LayerKV
from jaxspec.speculation.logprobs import Logprobs
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.penalties import Penalties
from jaxspec.splitting import BATCH, TENSOR, by_rows, constrained
from jaxspec.targets.images import Array

Rows = TypeVar("Rows")
STOP_TOKENS = 8
"""Stop tokens that a state has room for, or a multiple: a few more rarely mean another program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request(Generic[Array]):
    """What each row asks for."""

    sampling: BatchSampling
    max_new_tokens: Array  # i32 [B], at least 1
    stop_token_ids: Array  # i32 [B, K], -1 where unused
    logprobs: Array | None = None  # bool [B], rows whose log-probabilities are told; None where no row's are

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[np.ndarray],
        max_new_tokens: Sequence[int],
        end_token_ids: Sequence[int],
        vocab_size: int,
        extras: bool = False,
    ) -> "Request[np.ndarray]":
        """What a batch asks for, from the host.

        Args:
          params: of each row, with a number in every field (`SamplingParams.resolved`).
          prompts: their tokens, i32 [S] each.
          max_new_tokens: of each row, at least 1.
          end_token_ids: the target's own, beside the stop tokens of the rows. All have room for `STOP_TOKENS`, or for a
            multiple of these.
          vocab_size: V.
          extras: whether there is room for penalties and log-probabilities where no row asks for any, too, as in a
            state that rows come to which do.

        Raises ValueError where `min_tokens` leaves no token to choose.
        """
        stops = [(*end_token_ids, *each.stop_token_ids) for each in params]
        width = -(-max(1, *map(len, stops)) // STOP_TOKENS) * STOP_TOKENS
        penalties = None
        if extras or any(each.penalises for each in params):
            penalties = Penalties.from_params(params, prompts, stops, vocab_size)
        telling = np.array([each.logprobs is not None for each in params])
        return Request(
            sampling=BatchSampling.from_params(params, penalties),
            max_new_tokens=np.array(max_new_tokens, np.int32),
            stop_token_ids=np.array([[*row, *[-1] * (width - len(row))] for row in stops], np.int32),
            logprobs=telling if extras or telling.any() else None,
        )

    def counted(self, tokens: jax.Array, count: jax.Array) -> "Request":
        """The same after the first `count` i32 `[B]` of `tokens` i32 `[B, P]` were generated, which penalties count."""
        return dataclasses.replace(self, sampling=self.sampling.counted(tokens, count))

    def stops(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens i32 `[B, P]` end their row's answer: bool `[B, P]`."""
        return jnp.any(tokens[..., None] == self.stop_token_ids[:, None, :], axis=-1)


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

    def emission(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """How many of the first `length` i32 `[B]` tokens of an accepted path i32 `[B, P]` become output: up to the
        first stop token and the row's limit; 0 for rows that are done."""
        stops = self.request.stops(tokens)  # [B, P]
        before_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, tokens.shape[1])
        limit = self.request.max_new_tokens - self.counts
        return jnp.where(self.done, 0, jnp.minimum(jnp.minimum(length, before_stop), limit))


def placed(tree: Rows) -> Rows:
    """A state, or anything whose every leaf leads with the batch, as the mesh in use splits it: rows, and the heads of
    caches. Whoever hands a state on places it, so that every program finds it as it has been compiled for."""

    def part(x: jax.Array | LayerKV) -> jax.Array | LayerKV:
        if isinstance(x, LayerKV):
            return LayerKV(*(constrained(each, BATCH, TENSOR) for each in x))
        return by_rows(x)

    return jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, LayerKV))


def insert(state: DecodeState, slots: jax.Array, rows: DecodeState) -> DecodeState:
    """`state` with the n rows of another one in its `slots` i32 `[n]`, whatever stood there; a slot that is not there
    (-1, or B and more) takes none. Both have the same width of stop tokens, and room for the same extras; the other one
    may have less capacity, as much as its rows have used."""
    slots = jnp.where(slots < 0, state.done.shape[0], slots)  # which would count from the end

    def written(whole: jax.Array, new: jax.Array) -> jax.Array:
        return whole.at[(slots, *(slice(0, size) for size in new.shape[1:]))].set(new, mode="drop")

    return jax.tree.map(written, state, rows)


def moved(state: DecodeState, index: jax.Array) -> DecodeState:
    """The rows `index` i32 `[n]` of `state`, in that order; where it is -1, a slot that is free."""
    rows = jax.tree.map(lambda leaf: leaf[jnp.maximum(index, 0)], state)
    return dataclasses.replace(rows, done=rows.done | (index < 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report(Generic[Array]):
    """What a host wants to know of B rows between two rounds."""

    tokens: Array  # i32 [B, W], behind those that the host has seen
    from_draft: Array  # bool [B, W]
    counts: Array  # i32 [B], tokens in all
    done: Array  # bool [B]
    failed: Array  # bool [B]
    alone: Array  # bool [B]
    logprobs: Logprobs[Array] | None  # [B, W, ..]


def report(state: DecodeState, seen: jax.Array, width: int, logprobs: bool) -> Report[jax.Array]:
    """What there is to tell when the host has seen `seen` i32 `[B]` tokens of each row, and `width` more at most have
    come since."""
    places = seen[:, None] + jnp.arange(width)

    def new(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")

    told = jax.tree.map(new, state.logprobs) if logprobs else None
    tokens, from_draft = new(state.tokens), new(state.from_draft)
    return Report(tokens, from_draft, state.counts, state.done, state.failed, state.alone, told)


def finish(state: DecodeState, rows: jax.Array | np.ndarray) -> DecodeState:
    """The same with `rows` bool `[B]` done: a stop string that the host found has ended them."""
    return dataclasses.replace(state, done=state.done | rows)
