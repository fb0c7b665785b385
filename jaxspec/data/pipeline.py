"""The input pipeline: a random-access source of conversations becomes batches of few shapes.

Everything is a function of (seed, step). That makes a run repeatable, lets a stopped run go on at any step without
replaying what came before, and gives each process of a multi-host run its own share without coordination.
"""

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxspec.data.order import Order
from jaxspec.data.records import Encoder, Records
from jaxspec.targets.contract import TargetConfig
from jaxspec.targets.prompts import EncodedPrompt, stack_prompts


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation on the host, as a target reads it."""

    prompt: EncodedPrompt  # with its answers
    loss_mask: np.ndarray  # bool [S], True on the assistant's tokens


class Cutter:
    """Cuts conversations to `sequence_length` tokens.

    Attributes:
      truncated: how many conversations have been cut so far in this process (the first one warns).
    """

    def __init__(self, sequence_length: int, config: TargetConfig) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1; got {sequence_length}.")
        self.sequence_length = sequence_length
        self.truncated = 0
        self._config = config

    def __call__(self, example: Example) -> Example:
        """Raises ValueError where cutting would lose image tokens, which a model couldn't match with its pictures."""
        prompt, limit = example.prompt, self.sequence_length
        length = len(prompt.input_ids)
        if length <= limit:
            return example
        if np.any(self._config.is_image(prompt.input_ids[limit:])):
            raise ValueError(
                f"sequence_length {limit} cuts image tokens off a conversation of {length} tokens; raise it."
            )
        self._count(length)
        positions = None if prompt.position_ids is None else prompt.position_ids[:, :limit]
        return Example(EncodedPrompt(prompt.input_ids[:limit], prompt.images, positions), example.loss_mask[:limit])

    def _count(self, length: int) -> None:
        self.truncated += 1
        if self.truncated == 1:
            warnings.warn(
                f"A conversation of {length} tokens was cut to {self.sequence_length}; more may follow unannounced.",
                stacklevel=2,
            )


class Pipeline:
    """Batches of conversations, for ever.

    A record that cannot be encoded (a damaged picture, more image tokens than `sequence_length`) is left out with a
    warning that names it: its row repeats another one of the batch without counting in the loss, so that shapes and
    the order of all others stay. Where no row of a batch can be encoded, something else is wrong, and it raises.

    Args:
      source: random access to records.
      encoder: `encode_record(record)` gives the `Example` of one record, `length(record)` how many tokens it has, and
        `config` is the target's (`jaxspec.data.conversations.ConversationEncoder`,
        `jaxspec.data.answers.AnswerEncoder`).
      sequence_length: most tokens per row; longer conversations are cut.
      batch_size: rows per batch over all processes together.
      seed: decides the order; each epoch has its own.
      shuffle: False keeps the order of the source, epoch after epoch.
      length_buckets: pads a batch to the bucket (`jaxspec.buckets.bucket`) of its longest row instead of to
        `sequence_length`, and with `shuffle` puts conversations of similar length together (`jaxspec.data.order`).
        Little padding is left to save, so several short conversations are never packed into one row.
      process_index, process_count: which share of each batch this process gets.

    Attributes:
      skipped: how many rows this process has left out so far.

    Raises:
      ValueError: sizes that don't fit each other.
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
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size must be a multiple of process_count {process_count}; got {batch_size}.")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must lie within 0..{process_count - 1}; got {process_index}.")
        if not len(source):
            raise ValueError("The source must hold at least one record; it is empty.")
        self.cutter = Cutter(sequence_length, encoder.config)
        self.skipped = 0
        self._source, self._encoder = source, encoder
        self._share = slice(process_index, None, process_count)
        length_of = self._length if length_buckets else None
        self._order = Order(len(source), batch_size, sequence_length, seed, shuffle, length_of)
        self._batches = grain.MapDataset.range(sys.maxsize // batch_size).map(self._make)

    @property
    def truncated(self) -> int:
        """How many conversations this process has cut so far."""
        return self.cutter.truncated

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
        indices, length = self._order[step]
        examples, errors, ids = [], [], []
        for index in indices[self._share].tolist():
            record = self._source[index]
            ids.append(str(record.get("id", index)))
            try:
                examples.append(self._encode(record, length))
            except ValueError as error:
                examples.append(None)
                errors.append(f"record {ids[-1]}: {error}")
        good = next((example for example in examples if example is not None), None)
        if good is None:
            raise ValueError(f"no record of step {step} can be encoded; the first, {errors[0]}")
        for error in errors:
            self.skipped += 1
            warnings.warn(f"left out, {error} ({self.skipped} so far)", stacklevel=2)
        silent = dataclasses.replace(good, loss_mask=np.zeros_like(good.loss_mask))
        rows = [silent if example is None else example for example in examples]
        return {"ids": np.array(ids), **self._stack(rows, length)}

    def _encode(self, record: dict[str, Any], length: int) -> Example:
        example = self.cutter(self._encoder.encode_record(record))
        if len(example.loss_mask) > length:
            raise ValueError(f"it has {len(example.loss_mask)} tokens, more than the {length} that its length told")
        return example

    def _length(self, index: int) -> int:
        try:
            return self._encoder.length(self._source[index])
        except ValueError:
            return 0  # `_make` will tell

    def _stack(self, rows: Sequence[Example], length: int) -> dict[str, Any]:
        masks = [np.pad(row.loss_mask, (0, length - len(row.loss_mask))) for row in rows]
        prompts = stack_prompts(self._encoder.config, [row.prompt for row in rows], length)
        return {"prompts": prompts, "loss_mask": np.stack(masks)}
