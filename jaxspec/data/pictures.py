"""Images by reference: a data set of answers keeps a short text for each image instead of the image.

`scenes/train/17` is the demo's scene of that number, drawn anew. Anything else is relative to a folder: a path of an
image file, or SPLIT/INDEX in the folder of a prepared tensorflow-datasets set.
"""

import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxspec.data.records import Records, stored_records
from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.scenes import render
from jaxspec.media import ImageLike

SCENES = "scenes"


class Pictures:
    """What references stand for, as `jaxspec.media.open_image` takes it: a picture, encoded bytes or a path.

    Args:
      folder: what references are relative to; None where they are scenes.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.prepared = self.folder is not None and is_prepared(self.folder)
        self.splits: dict[str, Records[dict[str, Any]]] = {}

    def __getitem__(self, reference: str) -> ImageLike:
        """Raises ValueError for a reference that stands for nothing; whether a file exists is seen when it is read."""
        if self.folder is None:
            split, number = self.places(reference, rf"{SCENES}/(\w+)/(\d+)", f"{SCENES}/SPLIT/NUMBER")
            return render(numbered_scene(split, number)[0])
        if not self.prepared:
            return self.folder / reference
        split, index = self.places(reference, r"(\w+)/(\d+)", "SPLIT/INDEX")
        if split not in self.splits:
            self.splits[split] = open_records(self.folder, split)
        records = self.splits[split]
        if index >= len(records):
            raise ValueError(f"image {reference!r} is not in {self.folder}: the split has {len(records)} records")
        return records[index]["image"]

    def places(self, reference: str, pattern: str, form: str) -> tuple[str, int]:
        match = re.fullmatch(pattern, reference)
        if match is None:
            raise ValueError(f"images in {self.folder or SCENES} are referred to as {form}; got {reference!r}")
        return match[1], int(match[2])


def is_prepared(folder: Path) -> bool:
    """Whether tensorflow-datasets has prepared a set there."""
    return (folder / "dataset_info.json").is_file()


def open_records(folder: Path, split: str) -> Records[dict[str, Any]]:
    """Random access to a prepared set, images left as encoded bytes. Raises ValueError for an unknown split."""
    builder = tfds.builder_from_directory(str(folder))
    if split not in builder.info.splits:
        raise ValueError(f"split must be one of {', '.join(builder.info.splits)} in {folder}, got {split!r}")
    images = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    return stored_records(builder, split, images)
