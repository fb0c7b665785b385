"""Records: what every source of them offers, what an encoder makes of one, and what tensorflow-datasets has stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.prompts import EncodedPrompt

Record = TypeVar("Record", covariant=True)


class Records(Protocol[Record]):
    """What can be counted and read by number, a list or a file. Less than a `Sequence`: nobody searches it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class IllustratedRecords(Records[Record], Protocol[Record]):
    """Records that may have images."""

    @property
    def has_images(self) -> bool | None:
        """Whether any record has one; None where only reading them would tell."""
        ...


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation on the host, as a target reads it."""

    prompt: EncodedPrompt  # with its answers
    loss_mask: np.ndarray  # bool [S], True on the assistant's tokens


class Encoder(Protocol):
    """Reads the records of some source as a target does, for `jaxspec.data.pipeline`. Its methods raise ValueError for
    a record that cannot be read."""

    @property
    def adapter(self) -> PromptAdapter: ...

    def encode_record(self, record: dict[str, Any]) -> Example:
        """What is learned from the record."""
        ...

    def length(self, record: dict[str, Any]) -> int:
        """How many tokens `encode_record` will give."""
        ...


class QuestionEncoder(Encoder, Protocol):
    """One that can also ask."""

    def encode_question(self, record: dict[str, Any]) -> tuple[EncodedPrompt, int]:
        """The record's first question, to be answered anew, and how many tokens its answer has."""
        ...


def stored_records(
    builder: tfds.core.DatasetBuilder, split: str, decoders: Mapping[str, tfds.decode.Decoder] | None = None
) -> Records[dict[str, Any]]:
    """A split of a prepared set, each record a dict of its features; `decoders` as in tensorflow-datasets."""
    # The decorator of tensorflow-datasets hides that this is a method, and what it returns depends on `split`.
    return builder.as_data_source(split, decoders=decoders)  # pyrefly: ignore[bad-argument-type, bad-return]
