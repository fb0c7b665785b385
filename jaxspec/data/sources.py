"""Conversations from files, and as a data set that is made of them once.

`ConversationFiles` reads the file and leaves the pictures in their folder. `build_conversations` writes both into a
tensorflow-datasets ArrayRecord, pictures as the encoded bytes that they are, after looking at every one of them; a
`ConversationSource` opens it. A record is {"id", "images", "conversations"} either way; `open_conversations` finds out
what it is given. Every source says by `has_images` whether any of its records has an image, and reads none for it.

    build_conversations("data", "llava_pretrain", "blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain")
    source = ConversationSource("data", "llava_pretrain")
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from jaxspec.data.formats import name_of, printable, read_records, standard_record
from jaxspec.data.pictures import SCENES, Pictures, is_prepared
from jaxspec.data.prompts import SceneRecords
from jaxspec.data.records import stored_records
from jaxspec.media import open_images
from jaxspec.quiet import quiet

SHOWN = 20
"""How many of the skipped records a summary names; the data set's metadata has all."""


class ConversationFiles:
    """Random access to the records of one file that can be used; `images` are paths.

    Args:
      path: a JSON list or JSON lines, in any of the shapes of `jaxspec.data.formats`.
      image_folder: where the pictures' paths start; the file's own folder if None.

    Attributes:
      skipped: (id, reason) of each record that cannot be used.
      has_images: whether any record has an image.

    Raises:
      FileNotFoundError: no such file.
      ValueError: neither JSON list nor JSON lines, or no record can be used.
    """

    def __init__(self, path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None) -> None:
        path = Path(path)
        folder = path.parent if image_folder is None else Path(image_folder)
        self.skipped: list[tuple[str, str]] = []
        self._records: list[dict[str, Any]] = []
        for number, record in enumerate(read_records(path)):
            try:
                self._records.append(standard_record(record, number, folder))
            except ValueError as error:
                self.skipped.append((name_of(record, str(number)), str(error)))
        if not self._records:
            why = f"; the first, {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise ValueError(f"none of the {len(self.skipped)} records in {path} can be used{why}")
        self.has_images = any(record["images"] for record in self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]


class SceneConversations(SceneRecords):
    """The numbered scenes of the demo with their pictures and the true answers, made when they are asked for."""

    has_images: bool = True

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.pictures = Pictures(None)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = super().__getitem__(index)
        return {**record, "images": [self.pictures[reference] for reference in record["images"]]}


class Conversations(tfds.core.GeneratorBasedBuilder):
    """Conversations about pictures. Features: `id` the record's name; `images` encoded pictures in the order of their
    marks; `conversations` turns {"from", "value"} as JSON. Metadata: `with_images`, how many records have pictures;
    `skipped`, [id, reason] of the records of the file that could not be used."""

    name: ClassVar[str] = "conversations"
    VERSION: ClassVar[tfds.core.Version] = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded

    def __init__(self, *, files: ConversationFiles | None = None, **kwargs: Any) -> None:
        self.files = files
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()  # which keeps any bytes as they are
        features = {"id": text, "images": tfds.features.Sequence(text), "conversations": text}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        if self.files is None:
            raise ValueError(f"{self.data_dir} is not there, and there is no file to make it of")
        return {"train": self._generate_examples(self.files)}

    def _generate_examples(self, files: ConversationFiles) -> Iterator[tuple[int, dict]]:
        skipped, with_images = list(files.skipped), 0
        for index in range(len(files)):
            record = files[index]
            try:
                open_images(record["images"])
            except ValueError as error:
                skipped.append((record["id"], str(error)))
                continue
            with_images += bool(record["images"])
            images = [Path(path).read_bytes() for path in record["images"]]
            yield index, {**record, "images": images, "conversations": json.dumps(record["conversations"])}
        if len(skipped) == len(files) + len(files.skipped):
            raise ValueError(f"none of the {len(skipped)} records can be used; the last, {': '.join(skipped[-1])}")
        self.info.metadata.update(with_images=with_images, skipped=skipped)


def build_conversations(
    data_dir: str | os.PathLike[str],
    name: str,
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Make the data set `name` in `data_dir` of a file and its pictures, unless it is there already.

    Returns its folder. `report` is told how many records it has and which ones were skipped, and why. Raises as
    `ConversationFiles`.
    """
    builder = builder_of(data_dir, name)
    if Path(builder.data_dir).exists():
        report(f"{name} was made before; to make it anew, delete {builder.data_dir}")
    else:
        builder = builder_of(data_dir, name, ConversationFiles(path, image_folder))
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it downloads
            builder.download_and_prepare()
    metadata, skipped = builder.info.metadata, builder.info.metadata["skipped"]
    count = builder.info.splits["train"].num_examples
    report(f"{name}: {count} records, {metadata['with_images']} with images; {len(skipped)} skipped")
    for record_id, reason in skipped[:SHOWN]:
        report(printable(f"  skipped {record_id}: {reason}"))
    if len(skipped) > SHOWN:
        report(f"  and {len(skipped) - SHOWN} more, named in {Path(builder.data_dir) / 'metadata.json'}")
    return Path(builder.data_dir)


def builder_of(data_dir: str | os.PathLike[str], name: str, files: ConversationFiles | None = None) -> Conversations:
    with quiet("absl"):  # tensorflow-datasets warns of every configuration that is made by arguments
        config = tfds.core.BuilderConfig(name=name)
        return Conversations(data_dir=os.fspath(data_dir), config=config, file_format="array_record", files=files)


class ConversationSource:
    """Random access to a data set that `build_conversations` made; `images` are encoded pictures.

    Attributes:
      has_images: whether any record has an image; None where the set's metadata does not say.

    Raises:
      FileNotFoundError: there is none of that name.
    """

    def __init__(self, data_dir: str | os.PathLike[str], name: str) -> None:
        builder = builder_of(data_dir, name)
        if not Path(builder.data_dir).exists():
            raise FileNotFoundError(
                f"no data set {name!r} in {data_dir}; make it with: python -m jaxspec prepare FILE {data_dir}"
            )
        with_images = (builder.info.metadata or {}).get("with_images")
        self.has_images: bool | None = None if with_images is None else with_images > 0
        self._records = stored_records(builder, "train")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"A record's position must lie within 0..{len(self) - 1}; got {index}.")
        record = self._records[index]
        return {
            "id": record["id"].decode(),
            "images": list(record["images"]),
            "conversations": json.loads(record["conversations"]),
        }


def open_conversations(
    data: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None
) -> ConversationFiles | SceneConversations | ConversationSource:
    """The records of a .json or .jsonl file, of the folder of a set that `build_conversations` made, or of the demo's
    training scenes (`scenes`).

    Raises as `ConversationFiles` and `ConversationSource`, and ValueError for an image folder that nothing needs.
    """
    path = Path(data)
    if image_folder is not None and path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"image_folder is for .json and .jsonl files; {data} brings its images along")
    if data == SCENES:
        return SceneConversations("train")
    if not is_prepared(path):
        return ConversationFiles(path, image_folder)
    _, name, kind, data_dir = path.absolute(), *path.absolute().parents[:3]
    if kind.name != Conversations.name:
        raise ValueError(f"{path} holds no conversations made by build_conversations, but {kind.name}")
    return ConversationSource(data_dir, name.name)
