"""The self-distilled set: a target's own answers, as drafters are trained on (ViSpec section 3.4, MASSV section 3.2).

Only ids and references to the images are kept; features are recomputed while training. A set is an ordinary
tensorflow-datasets folder of ArrayRecord files, one file for each part of the prompts. A part is written whole and
its prompts are no other part's, so that stopped runs go on and several processes share the work; `distill.json` says
where everything came from, and `parts/` what was refused.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from jaxspec.data.pictures import Pictures
from jaxspec.data.records import Example, stored_records
from jaxspec.media import ImageLike, open_images
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.prompts import EncodedPrompt

NAME, ABOUT = "self_distilled", "distill.json"
FEATURES = tfds.features.FeaturesDict({
    "id": tfds.features.Text(),
    "prompt_ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),
    "answer_ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),
    "images": tfds.features.Sequence(tfds.features.Text()),
    "temperature": tfds.features.Scalar(np.float32),
    "seed": tfds.features.Scalar(np.int64),
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answered prompt."""

    id: str
    prompt_ids: np.ndarray  # i32 [n], image tokens expanded
    answer_ids: np.ndarray  # i32 [n], up to and including the stop token
    images: tuple[str, ...]  # references (jaxspec.data.pictures)
    temperature: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A prompt that could not be answered."""

    record: int
    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Part:
    """What became of the prompts of one file."""

    answers: Sequence[Answer]
    refused: Sequence[Refused] = ()
    cut: int = 0  # answers that ended at the limit of tokens


class AnswerParts:
    """The files of a set in the making.

    Args:
      folder: of the set; made if absent.
      records: the prompts of all parts, as their numbers in the source.
      part_size: prompts per part.
    """

    def __init__(self, folder: Path, records: range, part_size: int) -> None:
        self.folder, self.records = folder, records
        self.ranges = [records[start : start + part_size] for start in range(0, len(records), part_size)]
        (folder / "parts").mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.ranges)

    def file(self, part: int) -> Path:
        return self.folder / f"{NAME}-train.array_record-{part:05d}-of-{len(self):05d}"

    def report_file(self, part: int) -> Path:
        return self.folder / "parts" / f"{part:05d}-of-{len(self):05d}.json"

    def finished(self, part: int) -> bool:
        return self.file(part).exists()

    def write(self, part: int, made: Part) -> None:
        """Raises OSError where the disk is full; then the part is as if it had never been begun."""
        rows = [serialized(answer) for answer in made.answers]
        report = {
            "answers": len(rows),
            "bytes": sum(map(len, rows)),
            "prompt_tokens": sum(len(answer.prompt_ids) for answer in made.answers),
            "answer_tokens": sum(len(answer.answer_ids) for answer in made.answers),
            "cut": made.cut,
            "with_images": sum(bool(answer.images) for answer in made.answers),
            "refused": [dataclasses.asdict(each) for each in made.refused],
        }
        write_json(self.report_file(part), report)
        # The report comes first: a part whose file is there has one.
        temporary = temporary_name(self.file(part))
        try:
            write_records(temporary, rows)
            temporary.replace(self.file(part))
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self) -> dict:
        """Make the data set once all parts are finished; returns its counts and all that was refused.

        Raises ValueError where there is no answer in any part.
        """
        reports = [json.loads(self.report_file(part).read_text()) for part in range(len(self))]
        refused = [each for report in reports for each in report.pop("refused")]
        counted = [name for name in reports[0] if all(name in report for report in reports)]  # older ones lack some
        totals = {name: sum(report[name] for report in reports) for name in counted}
        if not totals["answers"]:
            first = f"{refused[0]['id']}: {refused[0]['reason']}"
            raise ValueError(f"none of the {len(self.records)} records could be answered; the first: {first}")
        for left_over in self.folder.glob(f".{NAME}-train.*.tmp"):  # by a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[report["answers"] for report in reports],
            num_bytes=totals.pop("bytes"),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=self.folder,
                template=template,
                dataset_name=NAME,
                split="train",
                filetype_suffix="array_record",
            ),
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.folder,
            features=FEATURES,
            split_infos=[split],
            filename_template=template,
            check_data=False,
            description="A target's own answers: jaxspec.data.answers.",
        )
        return {**totals, "refused": refused}


def serialized(answer: Answer) -> bytes:
    """A record of the set; the same bytes in every process, which protocol buffers do not promise by themselves."""
    example = FEATURES.serialize_example({
        "id": answer.id,
        "prompt_ids": np.asarray(answer.prompt_ids, np.int32),
        "answer_ids": np.asarray(answer.answer_ids, np.int32),
        "images": list(answer.images),
        "temperature": answer.temperature,
        "seed": answer.seed,
    })  # fmt: skip
    # The module of a protocol buffer makes its classes when it is imported.
    message = tf_example_pb2.Example  # pyrefly: ignore[missing-attribute]
    return message.FromString(example).SerializeToString(deterministic=True)


def write_records(path: Path, rows: Iterable[bytes]) -> None:
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
    except RuntimeError as error:  # what the writer makes of every error of the file system
        raise OSError(f"answers cannot be written: {error}") from error


def write_json(path: Path, content: dict) -> None:
    """Under a temporary name, then renamed."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Of this process: the same part may be in another's hands."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class AnswerSource:
    """Random access to a finished set together with the images it refers to.

    Args:
      folder: what `python -m jaxspec distill --output` wrote.
      image_folder: where the images are; where they were when the set was made by default.

    Attributes:
      about: `distill.json`, from settings to counts.
      has_images: whether any answer is about an image; None where `distill.json` does not say how many are.

    Raises:
      FileNotFoundError: there is no such set.
      ValueError: it is not finished.
    """

    def __init__(self, folder: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None) -> None:
        folder = Path(folder)
        if not (folder / ABOUT).exists():
            raise FileNotFoundError(
                f"no self-distilled answers in {folder}; make them with: python -m jaxspec distill --output {folder}"
            )
        self.about = json.loads((folder / ABOUT).read_text())
        if "answers" not in self.about:
            raise ValueError(f"the answers in {folder} are not finished; go on with: {self.about['command']}")
        self.has_images = None if "with_images" not in self.about else self.about["with_images"] > 0
        self.records = stored_records(tfds.builder_from_directory(str(folder)), "train")
        self.pictures = Pictures(image_folder or self.about["image_folder"])

    @classmethod
    def of_target(
        cls,
        folder: str | os.PathLike[str],
        fingerprint: str | None,
        image_folder: str | os.PathLike[str] | None = None,
    ) -> "AnswerSource":
        """The set in `folder`. Raises ValueError, too, where its answers are not those of the target with that
        `fingerprint` (`Target.fingerprint()`)."""
        answers = cls(folder, image_folder)
        theirs = answers.about["target_fingerprint"]
        if theirs != fingerprint:
            raise ValueError(f"the answers in {folder} are those of the target {theirs}, not of {fingerprint}")
        return answers

    def said(self) -> Iterator[np.ndarray]:
        """The tokens of every answer, i32 [n] each."""
        return (self.records[index]["answer_ids"] for index in range(len(self.records)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """`id` str, `prompt_ids` and `answer_ids` i32 [n], `images` (as `jaxspec.media.open_images` takes them),
        `temperature` and `seed`."""
        if not 0 <= index < len(self.records):
            raise IndexError(f"an answer's number must lie in 0..{len(self.records) - 1}, got {index}")
        record = self.records[index]
        images = [self.pictures[reference.decode()] for reference in record["images"]]
        return {**record, "id": record["id"].decode(), "images": images}


class AnswerEncoder:
    """Records of an `AnswerSource` as the target reads them, for `jaxspec.data.pipeline.Pipeline`."""

    def __init__(self, processor: Any, adapter: PromptAdapter) -> None:
        self.processor, self.adapter = processor, adapter

    def encode_record(self, record: dict) -> Example:
        """The prompt with its answer."""
        prompt, answer = np.asarray(record["prompt_ids"]), np.asarray(record["answer_ids"])
        encoded = self.encode(np.concatenate([prompt, answer]), record["images"])
        return Example(encoded, np.arange(len(encoded.input_ids)) >= len(prompt))

    def encode_question(self, record: dict) -> tuple[EncodedPrompt, int]:
        """The prompt alone, to be answered anew, and how many tokens its answer has."""
        return self.encode(np.asarray(record["prompt_ids"]), record["images"]), len(record["answer_ids"])

    def encode(self, ids: np.ndarray, images: Sequence[ImageLike]) -> EncodedPrompt:
        """Raises ValueError where an image has not as many tokens in the ids as features: it is another than the one
        answered about."""
        ids = ids.astype(np.int32)
        inputs = {"input_ids": ids[None]}
        if images:
            inputs |= self.processor.image_processor(open_images(images), return_tensors="np")
        return EncodedPrompt.of(self.adapter, ids, self.adapter.lay_out(inputs), self.processor.tokenizer)

    def length(self, record: dict) -> int:
        """How many tokens `encode_record` will give."""
        return len(record["prompt_ids"]) + len(record["answer_ids"])
