"""Which records make up which batch, and how long it is: a function of the step, the same in every process.

The stream of records is epoch after epoch, each in an order of its own. Without lengths a batch is the next records of
the stream. With lengths, batches are made within windows: the records of `WINDOW` batches are sorted by length, cut
into batches, and the batches shuffled. A window ends with its epoch, so that what the first batches hold is what they
would hold without it: every record once, before any comes again.
"""

import threading
from collections.abc import Callable, Iterator
from typing import cast

import grain
import numpy as np

from jaxspec.buckets import bucket

WINDOW = 32
"""Batches that are sorted together: enough that their lengths are close, few enough that reading lengths ahead is no
wait."""


class Order:
    """`order[step]` is the records' indices i64 [batch_size], and the tokens that the batch is padded to.

    Args:
      count: records of the source.
      limit: most tokens of a row.
      length_of: the tokens of the record of an index; None pads every batch to the limit.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        limit: int,
        seed: int,
        shuffle: bool,
        length_of: Callable[[int], int] | None = None,
    ) -> None:
        records = grain.MapDataset.range(count).seed(seed)
        self._stream = (records.shuffle() if shuffle else records).repeat()
        self._count, self._batch_size, self._limit, self._seed = count, batch_size, limit, seed
        self._length_of, self._window = length_of, WINDOW if shuffle else 1
        self._lengths = np.full(count, -1, np.int32)  # those that are known
        self._made: dict[range, list[tuple[np.ndarray, int]]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, step: int) -> tuple[np.ndarray, int]:
        if self._length_of is None:
            return self._records(range(step, step + 1)), self._limit
        window = self._window_of(step)
        with self._lock:  # threads that prepare batches ahead need the same window
            if window not in self._made:
                self._made[window] = self._make(window)
                if len(self._made) > 4:
                    del self._made[next(iter(self._made))]
            return self._made[window][step - window.start]

    def epoch(self) -> Iterator[int]:
        """The records of the first epoch, as they come where batches are made without lengths."""
        return (cast(int, self._stream[position]) for position in range(self._count))

    def _records(self, steps: range) -> np.ndarray:
        positions = range(steps.start * self._batch_size, steps.stop * self._batch_size)
        return np.array([self._stream[position] for position in positions])

    def _window_of(self, step: int) -> range:
        """The steps of a window: those of an epoch, the ones that begin in it, cut into pieces of `WINDOW`."""
        epoch = step * self._batch_size // self._count
        first, end = (-(-number * self._count // self._batch_size) for number in (epoch, epoch + 1))
        start = first + (step - first) // self._window * self._window
        return range(start, min(start + self._window, end))

    def _make(self, window: range) -> list[tuple[np.ndarray, int]]:
        records = self._records(window)
        assert self._length_of is not None  # without lengths there are no windows
        for index in records.tolist():
            if self._lengths[index] < 0:
                self._lengths[index] = min(self._length_of(index), self._limit)
        lengths = self._lengths[records]
        if self._window > 1:
            by_length = np.argsort(lengths, kind="stable")
            order = np.random.default_rng((self._seed, window.start)).permutation(len(window))
            rows = by_length.reshape(len(window), -1)[order]
        else:
            rows = np.arange(len(records)).reshape(len(window), -1)
        return [(records[row], min(bucket(int(lengths[row].max())), self._limit)) for row in rows]

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())
