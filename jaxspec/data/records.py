"""Random access to records: what every source of them offers, and what tensorflow-datasets has stored."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import tensorflow_datasets as tfds

Record = TypeVar("Record", covariant=True)


class Records(Protocol[Record]):
    """What can be counted and read by number, a list or a file. Less than a `Sequence`: nobody searches it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def stored_records(
    builder: tfds.core.DatasetBuilder, split: str, decoders: Mapping[str, tfds.decode.Decoder] | None = None
) -> Records[dict[str, Any]]:
    """A split of a prepared set, each record a dict of its features; `decoders` as in tensorflow-datasets."""
    # The decorator of tensorflow-datasets hides that this is a method, and what it returns depends on `split`.
    return builder.as_data_source(split, decoders=decoders)  # pyrefly: ignore[bad-argument-type, bad-return]
