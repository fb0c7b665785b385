"""The input pipeline: a random-access source of conversations becomes batches of few shapes.

Everything is a function of (seed, step). That makes a run repeatable, lets a stopped run go on at any step without
replaying what came before, and gives each process of a multi-host run its own share without coordination.
"""

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from jaxspec.data.order import Order
from jaxspec.data.records import Encoder, Example, Records
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.prompts import EncodedPrompt, stack_prompts

PATIENCE = 1000
"""So many records in a row that cannot be used end a run: nobody wants to wait for a whole set to be tried in vain."""
NAMED = 100
"""How many records that are left out are named; more are only counted."""


class Unusable(NamedTuple):
    """Why a record is left out."""

    reason: str
    length: int = 0  # where nothing of its answer is left to learn from: its tokens,
    prompt_length: int = 0  # and those before the answer
    fits: int = sys.maxsize  # tokens that a batch must have to use it after all


class Row(NamedTuple):
    """A record that is used, and how many tokens it had before it was cut."""

    example: Example
    length: int


def cut(example: Example, limit: int, adapter: PromptAdapter) -> Example:
    """The first `limit` tokens of a conversation. Raises ValueError where that would lose image tokens, which a model
    couldn't match with its pictures."""
    prompt = example.prompt
    length = len(prompt.input_ids)
    if length <= limit:
        return example
    if np.any(adapter.is_image(prompt.input_ids[limit:])):
        raise ValueError(f"sequence_length {limit} cuts image tokens off a conversation of {length} tokens; raise it.")
    positions = None if prompt.position_ids is None else prompt.position_ids[:, :limit]
    return Example(EncodedPrompt(prompt.input_ids[:limit], prompt.images, positions), example.loss_mask[:limit])


def teaches(loss_mask: np.ndarray, answer_run: int) -> bool:
    """Whether `answer_run` tokens in a row are the answer's in `loss_mask` bool [S], the first token apart: nothing
    stands before it that could foretell it."""
    answer = loss_mask[1:]
    if len(answer) < answer_run:
        return False
    return bool(np.lib.stride_tricks.sliding_window_view(answer, answer_run).all(axis=1).any())


class Pipeline:
    """Batches of conversations, for ever.

    A record that cannot be encoded (a damaged picture, more image tokens than `sequence_length`) or teaches nothing (no
    answer, or all of it cut away) is left out with a warning that names it: its row repeats another one of the batch
    without counting in the loss, so that shapes and the order of all others stay. A batch of such records alone is
    left out as a whole: the next one that has a usable record stands in for it, the same in every process.

    Args:
      source: random access to records.
      encoder: `encode_record(record)` gives the `Example` of one record, `length(record)` how many tokens it has, and
        `adapter` is the target's (`jaxspec.data.conversations.ConversationEncoder`,
        `jaxspec.data.answers.AnswerEncoder`).
      sequence_length: most tokens per row; longer conversations are cut.
      batch_size: rows per batch over all processes together.
      seed: decides the order; each epoch has its own.
      shuffle: False keeps the order of the source, epoch after epoch.
      length_buckets: pads a batch to the bucket (`jaxspec.buckets.bucket`) of its longest row instead of to
        `sequence_length`, and with `shuffle` puts conversations of similar length together (`jaxspec.data.order`).
        Little padding is left to save, so several short conversations are never packed into one row.
      answer_run: how many of an answer's tokens in a row a loss needs to learn anything.
      process_index, process_count: which share of each batch this process gets.

    Attributes:
      truncated: how many conversations this process has cut so far (the first one warns).
      skipped: how many rows this process has left out so far.

    Raises:
      ValueError: sizes that don't fit each other; when a batch is made, or by `check`: no record is usable.
    """

    def __init__(
        self,
        source: Records[dict[str, Any]],
        encoder: Encoder,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        length_buckets: bool = False,
        answer_run: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size must be a multiple of process_count {process_count}; got {batch_size}.")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must lie within 0..{process_count - 1}; got {process_index}.")
        if not len(source):
            raise ValueError("The source must hold at least one record; it is empty.")
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1; got {sequence_length}.")
        self.truncated = self.skipped = 0
        self._source, self._encoder = source, encoder
        self._sequence_length, self._answer_run = sequence_length, answer_run
        self._unusable: dict[int, Unusable] = {}  # as far as is known, by number
        self._share = slice(process_index, None, process_count)
        length_of = self._length if length_buckets else None
        self._order = Order(len(source), batch_size, sequence_length, seed, shuffle, length_of)
        self._batches = grain.MapDataset.range(sys.maxsize // batch_size).map(self._make)

    def shortfall(self) -> dict[str, int]:
        """What this process has lacked so far: `truncated` and `skipped`."""
        return {"truncated": self.truncated, "skipped": self.skipped}

    def check(self) -> None:
        """Raises ValueError where no record is usable. It looks for the first one that is, which takes no time in data
        that is as it should be."""
        for number, index in enumerate(self._order.epoch(), 1):
            if self._encode(index, self._sequence_length) is not None:
                return
            self._check_patience(number)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of one step, made on the spot; `batches` gives the same ones ahead of time."""
        batch = self._batches[step]
        assert batch is not None  # as of a filtered data set
        return batch

    def batches(
        self, start_step: int = 0, num_threads: int = 2, prefetch: int = 8, num_workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        """The batches of `start_step`, `start_step + 1`, ...

        Args:
          start_step: the first step; going on from any step costs nothing.
          num_threads: threads that prepare batches; 0 prepares each when it is asked for.
          prefetch: how many batches may be ready ahead.
          num_workers: processes that prepare batches, for machines with many cores; the batches and their order stay
            the same, but what the workers cut or leave out isn't counted in `truncated` and `skipped`. A script that
            uses them must guard its entry with `if __name__ == "__main__"`.

        Returns:
          An iterator of dicts with B = batch_size / process_count rows: `prompts`, a `PromptBatch` of S tokens,
          `loss_mask` bool [B, S], and `ids` [B], the records' names. S is sequence_length, or with `length_buckets` a
          bucket up to it.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0; got {start_step}.")
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
        dataset = self._batches[start_step:].to_iter_dataset(options)
        if num_workers:
            # Grain's worker processes read absl flags, which only an absl main function would have parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
            )
        return iter(dataset)

    def _make(self, step: int) -> dict[str, Any]:
        """The batch of the first step from `step` on that has a usable record."""
        tried: set[int] = set()
        while True:
            indices, length = self._order[step]
            own = indices[self._share].tolist()
            rows = [self._encode(index, length) for index in own]
            self.skipped += rows.count(None)
            # Of a share without a usable record the others decide whether this batch is left out, in every process.
            others = (self._encode(index, length) for index in indices.tolist())
            good = next((row.example for row in itertools.chain(rows, others) if row is not None), None)
            if good is not None:
                return self._batch(own, rows, good, length)
            tried.update(indices.tolist())
            self._check_patience(len(tried))
            step += 1

    def _batch(self, indices: list[int], rows: list[Row | None], good: Example, length: int) -> dict[str, Any]:
        """Rows that are left out repeat the `good` one without counting."""
        for row in rows:
            if row is not None and row.length > self._sequence_length:
                self._count_cut(row.length)
        silent = dataclasses.replace(good, loss_mask=np.zeros_like(good.loss_mask))
        examples = [silent if row is None else row.example for row in rows]
        return {"ids": np.array([self._name(index) for index in indices]), **self._stack(examples, length)}

    def _encode(self, index: int, length: int) -> Row | None:
        """A record within `length` tokens; None where it is left out."""
        if (known := self._unusable.get(index)) and length < known.fits:
            return None
        try:
            whole = self._encoder.encode_record(self._source[index])
            example = cut(whole, self._sequence_length, self._encoder.adapter)
        except ValueError as error:
            return self._leave_out(index, Unusable(str(error)))
        if not teaches(example.loss_mask, self._answer_run):
            return self._leave_out(index, self._why(whole.loss_mask))
        if (tokens := len(example.loss_mask)) > length:
            why = f"it has {tokens} tokens, more than the {length} that its length told"
            return self._leave_out(index, Unusable(why, fits=tokens))
        return Row(example, len(whole.loss_mask))

    def _count_cut(self, length: int) -> None:
        self.truncated += 1
        if self.truncated == 1:
            limit = self._sequence_length
            warnings.warn(
                f"A conversation of {length} tokens was cut to {limit}; more may follow unannounced.", stacklevel=2
            )

    def _why(self, loss_mask: np.ndarray) -> Unusable:
        """A conversation with this mask, not yet cut, has nothing to learn from."""
        length, limit, run = len(loss_mask), self._sequence_length, self._answer_run
        if not loss_mask.any():
            return Unusable("it has no answer", length, length)
        if not teaches(loss_mask, run):
            needed = "1 token behind a prompt" if run == 1 else f"{run} tokens in a row"
            return Unusable(f"its answer is too short: it takes {needed} to learn from", length, length)
        start = int(loss_mask.argmax())
        return Unusable(
            f"sequence_length {limit} leaves nothing to learn of its answer, which begins behind {start} tokens",
            length,
            start,
        )

    def _leave_out(self, index: int, why: Unusable) -> None:
        if len(self._unusable) < NAMED:
            count = len(self._unusable) + 1
            warnings.warn(f"left out, record {self._name(index)}: {why.reason} ({count} so far)", stacklevel=2)
        self._unusable[index] = why

    def _check_patience(self, tried: int) -> None:
        """Raises ValueError where all records, or `PATIENCE` in a row, were tried in vain."""
        count = len(self._source)
        if tried < min(count, PATIENCE):
            return
        which = f"none of {count} records" if tried == count else f"none of {tried} records in a row"
        (index, first), *_ = self._unusable.items()
        told = f"{which} can be learned from; the first, record {self._name(index)}: {first.reason}"
        sizes = [(why.length, why.prompt_length) for why in self._unusable.values() if why.length]
        if sizes:
            lengths, prompts = zip(*sizes, strict=True)
            told += (
                f". With sequence_length {self._sequence_length}: records have {int(np.median(lengths))} tokens "
                f"typically and {max(lengths)} at most, their answers begin behind {int(np.median(prompts))} typically "
                f"and {min(prompts)} at least"
            )
        raise ValueError(told)

    def _name(self, index: int) -> str:
        """What a record is called: its number, where it has no name or cannot be read."""
        try:
            return str(self._source[index].get("id", index))
        except ValueError:
            return str(index)

    def _length(self, index: int) -> int:
        try:
            return self._encoder.length(self._source[index])
        except ValueError:
            return 0  # `_make` will tell

    def _stack(self, rows: Sequence[Example], length: int) -> dict[str, Any]:
        masks = [np.pad(row.loss_mask, (0, length - len(row.loss_mask))) for row in rows]
        prompts = stack_prompts(self._encoder.adapter, [row.prompt for row in rows], length)
        return {"prompts": prompts, "loss_mask": np.stack(masks)}
