"""Prompts on their way into an engine: a queue in which clients take turns, and a thread that reads one prompt after
the other, up to its first token.

Reading goes on beside the rounds of other rows, in pieces: a chunk of a prompt, an image, the beginning of an answer.
The device does one thing after the other, so a round waits for one piece at most. What has to be compiled first (an
image or a prompt of a new size) holds up the prompts behind it, and no round.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.buckets import bucket
from jaxspec.programs import Programs
from jaxspec.serving.caches import ByteCache, Prefixes, nbytes
from jaxspec.serving.row import Row
from jaxspec.serving.slots import STOP_WIDTH, rooms
from jaxspec.speculation import state as rows
from jaxspec.speculation.logprobs import Logprobs
from jaxspec.speculation.prefill import ImageFeatures
from jaxspec.speculation.state import DecodeState
from jaxspec.targets.chunks import images_of, steps_of


class FairQueue:
    """Rows that wait. Each client's in order; clients take turns, so that one who asks much holds up no other."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, row: Row) -> None:
        self._clients.setdefault(row.request.client, deque()).append(row)

    def get(self) -> Row:
        """The next one; there must be one."""
        client, waiting = self._clients.popitem(last=False)
        row = waiting.popleft()
        if waiting:
            self._clients[client] = waiting  # behind the others
        return row

    def rows(self) -> list[Row]:
        """All of them."""
        return [row for waiting in self._clients.values() for row in waiting]

    def remove(self, unwanted: Callable[[Row], bool]) -> list[Row]:
        """Take out all rows that are not wanted any more."""
        gone = []
        for client, waiting in [*self._clients.items()]:
            gone += [row for row in waiting if unwanted(row)]
            kept = deque(row for row in waiting if not unwanted(row))
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        return gone


class Begun(NamedTuple):
    """A row that waits for a slot."""

    row: Row
    state: DecodeState  # of one row, with as many positions as its prompt needs


class PromptReader:
    """Reads prompts.

    Args:
      programs: of target and drafter.
      params: theirs.
      capacity: positions of the state that rows are inserted into.
      end_token_ids: the target's own stop tokens.
      image_bytes: what features of images may take.
      prefix_bytes: what prompts that were read may take.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        capacity: int,
        end_token_ids: tuple[int, ...],
        image_bytes: int,
        prefix_bytes: int,
    ) -> None:
        self.programs, self.params, self.capacity, self.end_token_ids = programs, params, capacity, end_token_ids
        self.images: ByteCache[Any, ImageFeatures] = ByteCache(image_bytes)
        self.prefixes = Prefixes(programs.adapter, prefix_bytes)

    def begin(self, row: Row, wanted: Callable[[], bool] = lambda: True, keep: bool = True) -> Begun | None:
        """The row after its first token, which it has taken. None where it is not `wanted` any more, which is asked
        between two pieces. With `keep`, later prompts may go on from what was read."""
        programs, params, prompt = self.programs, self.params, row.request.prompt
        if row.request.grammar is not None:
            row.matcher = row.request.grammar.matcher(row.request.sampling.stop_token_ids)
        room = next(room for room in rooms(self.capacity) if room > len(prompt.input_ids))
        read, row.cached_tokens = self.prefixes.find(prompt)
        images, tables = images_of([prompt]), {}
        for step in steps_of(programs.adapter, [prompt], programs.chunk, room, [row.cached_tokens]):
            if not wanted():
                return None
            for key in step.placements.keys() - tables.keys():
                table = self.images.get(key)
                if table is None:
                    table = jax.block_until_ready(programs.encode(params, images[key]))
                    self.images.put(key, table, nbytes(table))
                tables[key] = table
            if read is not None:
                read = programs.with_room(read, room)
            read = jax.block_until_ready(programs.read_step(params, read, step, tables))
        assert read is not None  # there is at least one step
        read = programs.with_room(read, room)
        if keep and self.prefixes.limit:
            # Without the room for an answer, and beside the one that `begin` goes on with.
            self.prefixes.keep(prompt, programs.with_room(read, bucket(len(prompt.input_ids))))
        allowed = None if row.matcher is None else row.matcher.start()[None, None]
        state = programs.begin(params, read, self.request(row), [prompt], self.capacity, allowed, room)
        self.first_token(row, state)
        return Begun(row, state)

    def request(self, row: Row) -> rows.Request[np.ndarray]:
        """What the row asks for, with room for what other rows of the state may ask."""
        asked, own = row.request, row.request.sampling.stop_token_ids
        ends = (*self.end_token_ids, *[-1] * (STOP_WIDTH - len(self.end_token_ids) - len(own)))
        ids = [asked.prompt.input_ids]
        return rows.Request.of([asked.sampling], ids, [asked.max_new_tokens], ends, self.programs.vocab_size, True)

    def first_token(self, row: Row, state: DecodeState) -> None:
        """The row takes it in."""
        logprobs = state.logprobs if row.wants_logprobs else None
        found = jax.device_get((state.tokens[:, :1], state.counts, state.done, state.failed, logprobs))
        tokens, counts, done, failed, told = found
        count = int(counts[0])
        if told is not None:
            told = Logprobs(*(part[0, :count] for part in (told.token_logprobs, told.top_ids, told.top_logprobs)))
        row.take(tokens[0, :count], np.zeros(count, bool), told)
        row.done, row.failed = bool(done[0]), bool(failed[0])
        if row.matcher is not None and not row.done:
            row.matcher.accept(tokens[0, :count].tolist())


class ReadingThread:
    """Reads while there is something to read and somebody to take it.

    Args:
      reader: what reads.
      next_row: blocks until there is a row to be read; None ends the thread.
      begun: is given every row that has begun.
      failed: is given a row and the exception that reading it raised.
    """

    def __init__(
        self,
        reader: PromptReader,
        next_row: Callable[[], Row | None],
        begun: Callable[[Begun], None],
        failed: Callable[[Row, Exception], None],
    ) -> None:
        self._reader, self._next_row, self._begun, self._failed = reader, next_row, begun, failed
        self._thread = threading.Thread(target=self._run, name="jaxspec-reading", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (row := self._next_row()) is not None:
            try:
                begun = self._reader.begin(row, lambda row=row: not row.cancelled)
                if begun is not None:
                    self._begun(begun)
                    continue
                self._failed(row, Cancelled())
            except Exception as error:  # noqa: BLE001 (whatever one prompt does, the others are answered)
                self._failed(row, error)


class Cancelled(Exception):
    """Nobody waits for it any more."""
