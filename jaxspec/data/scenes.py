"""The demo's training set as a tensorflow-datasets builder that needs no TensorFlow.

Rendering is cheap, but a stored data set in a random-access format is what real training data looks like, so that the
same pipeline serves the demo and anything else that tensorflow-datasets can prepare.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jaxspec.data.records import Records, stored_records
from jaxspec.demo.generation import conversation_of, numbered_scene
from jaxspec.demo.scenes import FRAME, render
from jaxspec.quiet import quiet


@dataclasses.dataclass
class JaxspecScenesConfig(tfds.core.BuilderConfig):
    """How many scenes each split holds; each size has its own folder, since the name says the sizes."""

    name: str = ""
    train_size: int = 40_000
    validation_size: int = 500
    test_size: int = 500

    def __post_init__(self) -> None:
        for field in ("train_size", "validation_size", "test_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}.")
        self.name = f"scenes_{self.train_size}_{self.validation_size}_{self.test_size}"


class JaxspecScenes(tfds.core.GeneratorBasedBuilder):
    """Rendered scenes with questions and true answers.

    Record number i of a split depends on (split, i) alone. Features: `index` int64; `image` PNG, uint8 [288, 288, 3];
    `scene` the truth as JSON (`jaxspec.demo.scenes.scene_from_json`); `conversations` LLaVA-style turns as JSON;
    `kinds` the kinds of the questions as JSON.
    """

    name: ClassVar[str] = "jaxspec_scenes"
    VERSION: ClassVar[tfds.core.Version] = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Looking for a checksum file would import a package that tensorflow-datasets uses without
    # declaring it.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "index": tfds.features.Scalar(np.int64),
                "image": tfds.features.Image(shape=(FRAME, FRAME, 3), encoding_format="png"),
                "scene": tfds.features.Text(),
                "conversations": tfds.features.Text(),
                "kinds": tfds.features.Text(),
            }),
            description=self.__doc__,
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        sizes = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        for index in range(size):
            scene, turns = numbered_scene(split, index)
            picture = io.BytesIO()
            # Flat colours compress well at once; more effort would only make generation slower.
            render(scene).save(picture, format="PNG", compress_level=1)
            picture.seek(0)
            yield (
                index,
                {
                    "index": index,
                    "image": picture,
                    "scene": json.dumps(scene.to_json()),
                    "conversations": json.dumps(conversation_of(turns)),
                    "kinds": json.dumps([turn.kind for turn in turns]),
                },
            )


class StoredScenes:
    """Random access to one split, with pictures left as encoded bytes: whoever needs pixels decodes them once."""

    def __init__(self, source: Records[dict[str, Any]]) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._source):
            raise IndexError(f"A record's position must lie within 0..{len(self._source) - 1}; got {index}.")
        record = self._source[index]
        return {
            "index": int(record["index"]),
            "images": [bytes(record["image"])],
            "scene": json.loads(record["scene"]),
            "conversations": json.loads(record["conversations"]),
            "kinds": json.loads(record["kinds"]),
        }


def load_scenes(
    data_dir: str | os.PathLike[str],
    split: str = "train",
    train_size: int = 40_000,
    validation_size: int = 500,
    test_size: int = 500,
) -> StoredScenes:
    """Prepares the data set in `data_dir` unless it is there already, and opens one split.

    Returns:
      A random-access source of dicts: `index` int, `images` list with one PNG as bytes, `scene` dict, `conversations`
      list of {"from", "value"}, `kinds` list of str.

    Raises:
      ValueError: unknown split, or a size below 1.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be one of train, validation, test; got {split!r}.")
    config = JaxspecScenesConfig(train_size=train_size, validation_size=validation_size, test_size=test_size)
    with quiet("absl"):  # tensorflow-datasets warns of every configuration that is made by arguments
        builder = JaxspecScenes(data_dir=os.fspath(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return StoredScenes(stored_records(builder, split, {"image": tfds.decode.SkipDecoding()}))
