"""The rows that are being decoded: slots of one `DecodeState` on the device, and what the host does between rounds.

There are states of a few sizes, each with its own compiled programs; rows move to a larger or a smaller one as requests
come and go. `Slots` belongs to the engine's thread.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.metrics import emitted_per_round
from jaxspec.programs import Programs
from jaxspec.serving.row import Row
from jaxspec.speculation.state import DecodeState, Report, finish
from jaxspec.speculation.tree import TreeConfig

STOP_WIDTH = 16
"""Stop tokens of a request, the target's own included, at most."""
WINDOW = 8
"""Rounds without drafts after which a drafter hears of them, and of other rounds between two looks of the host."""


class Ran(NamedTuple):
    """What some rounds did."""

    tree: TreeConfig
    slots: int
    rounds: int
    seconds: float
    rows: list[Row]
    emitted: list[np.ndarray]  # i64 [P] of each: rounds that emitted 1, 2, .. tokens


def sizes(most: int) -> list[int]:
    """How many slots a state may have: powers of two, of four where a device is as fast with some that are free, and
    `most`."""
    step = 1 if jax.default_backend() == "cpu" else 2
    return [*(1 << power for power in range(0, most.bit_length(), step) if 1 << power < most), most]


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
        if any(row.matcher is not None for row in self.running):
            found = self._look_within(tree)
        else:
            if tree.total_tokens == 1:
                self.state = self.programs.decode_undrafted(self.params, self.state, jnp.int32(rounds), WINDOW)
            else:
                self.state = self.programs.decode(self.params, self.state, jnp.int32(rounds), tree)
            found = self._look()
        emitted, most = self._taken(found)
        return Ran(tree, len(self.rows), most, time.perf_counter() - started, self.running, emitted)

    def compile(self, size: int, trees: Sequence[TreeConfig]) -> None:
        """Everything that rows in so many slots need, by running it without any."""
        state, nowhere = self.idle(size), np.array([-1], np.int32)
        for room in rooms(self.capacity):
            begun = self.programs.idle(self.params, 1, room, STOP_WIDTH, extras=True)
            state = self.programs.insert(state, nowhere, begun)
        none = np.zeros(size, np.int32)
        for tree in trees:
            if tree.total_tokens == 1:
                state = self.programs.decode_undrafted(self.params, state, jnp.int32(1), WINDOW)
            else:
                state = self.programs.decode(self.params, state, jnp.int32(1), tree)
        self.programs.report(state, none, WINDOW * self.width)
        at = self.sizes.index(size) if size in self.sizes else len(self.sizes)
        for other in self.sizes[:at]:
            self.programs.moved(self.idle(other), np.full(size, -1, np.int32))
        if at:
            self.programs.moved(state, np.full(self.sizes[at - 1], -1, np.int32))
        jax.block_until_ready(state)

    def _report(self) -> Report[jax.Array]:
        assert self.state is not None
        seen = np.array([0 if row is None else row.seen for row in self.rows], np.int32)
        told = any(row.wants_logprobs for row in self.running)
        return self.programs.report(self.state, seen, WINDOW * self.width, told)

    def _look(self) -> Report[np.ndarray]:
        return on_host(self._report())

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
            except Exception as error:  # noqa: BLE001 (one request's grammar must not end the others)
                row.failure = f"the grammar failed: {error}"
        drafted = drafted._replace(tokens=jnp.asarray(nodes))
        self.state = self.programs.confirm(self.params, self.state, drafted, allowed, tree)
        return found

    def _taken(self, found: Report[np.ndarray]) -> tuple[list[np.ndarray], int]:
        """Rows take what is new; how many of their rounds emitted how much, and the rounds of the row with most."""
        emitted, most = [], 0
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            count = int(found.counts[slot]) - row.seen
            new, drafted = found.tokens[slot, :count], found.from_draft[slot, :count]
            told = None if found.logprobs is None else jax.tree.map(lambda x, at=slot: x[at], found.logprobs)
            row.take(new, drafted, told)
            row.done, row.failed = bool(found.done[slot]), bool(found.failed[slot])
            counts = emitted_per_round(drafted, self.width)
            emitted.append(counts)
            most = max(most, int(counts.sum()))
        return emitted, most


def on_host(tree: Any) -> Any:
    """The same with numpy's arrays."""
    return jax.device_get(tree)
