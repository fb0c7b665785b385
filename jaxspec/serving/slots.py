"""The rows that are being decoded: slots of one `DecodeState` on the device, and what the host does between rounds.

There are states of a few sizes, each with its own compiled programs; rows move to a larger or a smaller one as requests
come and go. `Slots` belongs to the engine's thread.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.metrics import emitted_per_round
from jaxspec.programs import Programs
from jaxspec.serving.row import Row, sentence
from jaxspec.speculation.state import DecodeState, Report, finish
from jaxspec.speculation.tree import TreeConfig

log = logging.getLogger(__name__)
STOP_WIDTH = 16
"""Stop tokens of a request, the target's own included, at most."""
WINDOW = 8
"""Rounds without drafts after which a drafter hears of them, and of other rounds between two looks of the host."""
SLICE_SECONDS = 0.05
"""About how long rows run between two looks of the host."""
UNSEEN = WINDOW + 1
"""Rounds that the host may not have seen when it looks: one more, since a look in the middle of a round is one at what
came before it."""


class Ran(NamedTuple):
    """What some rounds did."""

    tree: TreeConfig
    slots: int
    looked: bool  # the host looked within the round, which took longer for it
    rounds: int
    seconds: float
    rows: list[Row]
    emitted: list[np.ndarray]  # i64 [P] of each: rounds that emitted 1, 2, .. tokens


def sizes(most: int) -> list[int]:
    """How many slots a state may have: powers of two, of four where a device is as fast with some that are free, and
    `most`."""
    step = 1 if jax.default_backend() == "cpu" else 2
    return [*(1 << power for power in range(0, most.bit_length(), step) if 1 << power < most), most]


def rounds_of(seconds: float) -> int:
    """How many rounds of so many seconds rows run between two looks of the host."""
    return int(np.clip(SLICE_SECONDS / seconds, 1, WINDOW))


def rooms(capacity: int) -> list[int]:
    """How many positions a row may have before it takes a slot."""
    return [*(1 << power for power in range(6, capacity.bit_length()) if 1 << power < capacity), capacity]


class Slots:
    """Those of an engine.

    Args:
      programs: of target and drafter.
      params: theirs.
      capacity: positions of each row.
      most: rows at once.
      width: tokens that a round may emit, at most.
    """

    def __init__(self, programs: Programs, params: Any, capacity: int, most: int, width: int) -> None:
        self.programs, self.params, self.capacity, self.width = programs, params, capacity, width
        self.sizes = sizes(most)
        """What may be had; `warm_up` takes those away that are not compiled yet."""
        self.rows: list[Row | None] = []
        self.state: DecodeState | None = None

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def free(self) -> int:
        """Rows that may still come."""
        return self.sizes[-1] - len(self.running)

    def idle(self, size: int) -> DecodeState:
        return self.programs.idle(self.params, size, self.capacity, STOP_WIDTH, extras=True)

    @property
    def nbytes(self) -> int:
        """What all slots take on the device."""
        shapes = jax.eval_shape(lambda: self.idle(self.sizes[-1]))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def resize(self, needed: int) -> None:
        """The smallest size that has so many slots."""
        size = next(size for size in self.sizes if size >= needed)
        if size == len(self.rows):
            return
        if self.state is None or not self.running:
            self.state = self.idle(size)
            self.rows = [None for _ in range(size)]
            return
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        index = np.full(size, -1, np.int32)
        index[: len(kept)] = kept
        self.state = self.programs.moved(self.state, index)
        self.rows = [*(self.rows[slot] for slot in kept), *[None] * (size - len(kept))]

    @property
    def looks(self) -> bool:
        """Whether the host has a look within each round, since some row follows a grammar."""
        return any(row.matcher is not None for row in self.running)

    def insert(self, row: Row, begun: DecodeState, more: int = 0) -> None:
        """A row that has begun; there must be a free slot. `more` rows will come soon."""
        if None not in self.rows:
            self.resize(min(len(self.running) + 1 + more, self.sizes[-1]))
        assert self.state is not None  # resizing makes one
        slot = self.rows.index(None)
        self.state = self.programs.insert(self.state, np.array([slot], np.int32), begun)
        self.rows[slot] = row

    def remove(self, gone: list[Row]) -> None:
        """Free the slots of these rows."""
        if gone and self.state is not None:
            ended = np.array([row in gone for row in self.rows])
            self.state = finish(self.state, ended)
            self.rows = [None if row in gone else row for row in self.rows]

    def shrink(self) -> None:
        """The next smaller size, where fewer slots are needed."""
        at = self.sizes.index(len(self.rows)) if self.rows else 0
        if not self.running:
            self.clear()
        elif at and len(self.running) <= (self.sizes[at - 1] * 3 + 3) // 4:
            self.resize(self.sizes[at - 1])

    def clear(self) -> list[Row]:
        """No rows, and nothing on the device; those that were there."""
        gone = self.running
        self.state, self.rows = None, []
        return gone

    def run(self, tree: TreeConfig, rounds: int) -> Ran:
        """So many rounds with that tree, of which rows take in what they say; at most `WINDOW`."""
        assert self.state is not None  # there are rows
        started = time.perf_counter()
        looked = self.looks
        if looked:
            found = self._look_within(tree)
        else:
            self.state = self._decoded(self.state, tree, rounds)
            found = on_host(self._report())
        emitted, most = self._taken(found, tree.max_depth)
        if looked:
            for row in self.running:
                row.unseen_depth = tree.max_depth
        return Ran(tree, len(self.rows), looked, most, time.perf_counter() - started, self.running, emitted)

    def compile(self, size: int, trees: Sequence[TreeConfig]) -> None:
        """Everything that rows in so many slots need, by running it without any."""
        state, nowhere = self.idle(size), np.array([-1], np.int32)
        for room in rooms(self.capacity):
            begun = self.programs.idle(self.params, 1, room, STOP_WIDTH, extras=True)
            state = self.programs.insert(state, nowhere, begun)
        none = np.zeros(size, np.int32)
        for tree in trees:
            state = self._decoded(state, tree, 1)
        self.programs.report(state, none, UNSEEN * self.width)
        self.programs.report(state, none, UNSEEN * self.width, True)
        at = self.sizes.index(size) if size in self.sizes else len(self.sizes)
        for other in self.sizes[:at]:
            self.programs.moved(self.idle(other), np.full(size, -1, np.int32))
        if at:
            self.programs.moved(state, np.full(self.sizes[at - 1], -1, np.int32))
        jax.block_until_ready(state)

    def time(self, size: int, tree: TreeConfig) -> float:
        """Seconds a round of full slots takes, with caches half filled and a look of the host behind as many rounds as
        there usually are; nan where that cannot be measured. Everything must be compiled."""
        rounds, taken = 1, float("nan")
        for _ in range(2):
            state = self._busy(size)
            started = time.perf_counter()
            state = self._decoded(state, tree, rounds)
            on_host(self.programs.report(state, np.zeros(size, np.int32), UNSEEN * self.width))
            taken = (time.perf_counter() - started) / rounds
            if int(state.rounds.min()) < rounds:  # random weights may say NaN of nothing
                return float("nan")
            rounds = rounds_of(taken)
        return taken

    def _decoded(self, state: DecodeState, tree: TreeConfig, rounds: int) -> DecodeState:
        """The state, which is consumed, after so many rounds with that tree."""
        if tree.total_tokens == 1:
            return self.programs.decode_undrafted(self.params, state, jnp.int32(rounds), WINDOW)
        return self.programs.decode(self.params, state, jnp.int32(rounds), tree)

    def _busy(self, size: int) -> DecodeState:
        """Rows that say something, whatever it is, without an end."""
        state = self.idle(size)
        cache = dataclasses.replace(state.cache, lengths=jnp.full_like(state.cache.lengths, self.capacity // 2))
        limit, ends = jnp.full_like(state.counts, self.capacity), jnp.full_like(state.request.stop_token_ids, -1)
        request = dataclasses.replace(state.request, max_new_tokens=limit, stop_token_ids=ends)
        busy = dataclasses.replace(state, cache=cache, request=request, done=jnp.zeros_like(state.done))
        return jax.block_until_ready(busy)

    def _report(self) -> Report[jax.Array]:
        assert self.state is not None
        seen = np.array([0 if row is None else row.seen for row in self.rows], np.int32)
        told = any(row.wants_logprobs for row in self.running)
        return self.programs.report(self.state, seen, UNSEEN * self.width, told)

    def _look_within(self, tree: TreeConfig) -> Report[np.ndarray]:
        """One round with a look of the host in its middle: grammars say what may follow each node of the tree. What the
        rows have said is of the round before."""
        assert self.state is not None
        drafted = self.programs.draft(self.params, self.state, tree)
        found, nodes, parents = on_host((self._report(), drafted.tokens, drafted.parents))
        vocabulary = self.programs.vocab_size
        allowed = np.full((*nodes.shape, -(-vocabulary // 32)), 2**32 - 1, np.uint32)
        nodes = nodes.copy()
        for slot, row in enumerate(self.rows):
            if row is None or row.matcher is None or found.done[slot]:
                continue
            new = found.tokens[slot, : found.counts[slot] - row.seen]
            try:
                row.matcher.accept(new.tolist())
                nodes[slot], allowed[slot] = row.matcher.tree(nodes[slot], parents[slot], not found.alone[slot])
            except RuntimeError as error:  # as `Matcher` says
                row.failure = f"the grammar failed: {error}"
            except Exception as error:  # one request's grammar must not end the others
                log.exception("a grammar failed")
                row.failure, row.cause = "the grammar failed", sentence(error)
        drafted = drafted._replace(tokens=jnp.asarray(nodes))
        self.state = self.programs.confirm(self.params, self.state, drafted, allowed, tree)
        return found

    def _taken(self, found: Report[np.ndarray], depth: int) -> tuple[list[np.ndarray], int]:
        """Rows take what is new; how many of their rounds emitted how much, and the rounds of the row with most. The
        rounds' tree has this depth."""
        emitted, most = [], 0
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            count = int(found.counts[slot]) - row.seen
            new, drafted = found.tokens[slot, :count], found.from_draft[slot, :count]
            told = None if found.logprobs is None else jax.tree.map(lambda x, at=slot: x[at], found.logprobs)
            counts = emitted_per_round(drafted, self.width)
            try:
                row.take(new, drafted, told)
            except Exception as error:
                log.exception("an answer cannot be told")
                row.failure, row.cause = "the answer cannot be told", sentence(error)
            row.drafted(int(counts.sum()), depth)
            row.done, row.failed = bool(found.done[slot]), bool(found.failed[slot])
            emitted.append(counts)
            most = max(most, int(counts.sum()))
        return emitted, most


def on_host(tree: Any) -> Any:
    """The same with numpy's arrays."""
    return jax.device_get(tree)
