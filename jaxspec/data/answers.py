"""The self-distilled set: a target's own answers, as drafters are trained on (ViSpec section 3.4, MASSV section 3.2).

Only ids and a reference to the picture are kept; features are recomputed while training. Answers are generated in parts
that are written whole, so a stopped run goes on where it was; the finished set is a tensorflow-datasets ArrayRecord.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from jaxspec.data.pipeline import Example
from jaxspec.media import open_images
from jaxspec.targets.contract import TargetConfig
from jaxspec.targets.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answered prompt; `picture` is the index of its record in the split it was made from."""

    picture: int
    prompt_ids: list[int]  # image tokens expanded
    answer_ids: list[int]  # up to and including the stop token
    temperature: float
    seed: int


def generate_parts(
    folder: Path, count: int, part_size: int, answer: Callable[[range], Sequence[Answer]], report: Callable[[int], None]
) -> list[Path]:
    """Answers 0 .. count - 1 as JSON-lines files of `part_size`, skipping the parts that are already there.

    `answer(indices)` answers some of them; `report(done)` is told after each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, count, part_size):
        stop = min(start + part_size, count)
        path = folder / f"part-{start:08d}-{stop:08d}.jsonl"
        if not path.exists():
            lines = [json.dumps(dataclasses.asdict(one)) for one in answer(range(start, stop))]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("\n".join(lines) + "\n")
            temporary.replace(path)
        parts.append(path)
        report(stop)
    return parts


class SelfDistilled(tfds.core.GeneratorBasedBuilder):
    """Answers from finished parts. Features: `picture` int64, `prompt_ids` and `answer_ids` int32 [n],
    `temperature` float32, `seed` int64."""

    name = "self_distilled"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing is downloaded

    def __init__(self, *, parts: Sequence[Path] = (), **kwargs):
        self.parts = parts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        ids = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({
                "picture": tfds.features.Scalar(np.int64),
                "prompt_ids": ids,
                "answer_ids": ids,
                "temperature": tfds.features.Scalar(np.float32),
                "seed": tfds.features.Scalar(np.int64),
            }),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in self.parts:
            for line in path.read_text().splitlines():
                record = json.loads(line)
                for key in ("prompt_ids", "answer_ids"):
                    record[key] = np.asarray(record[key], np.int32)
                yield record["picture"], record


def build_answers(data_dir: Path, parts: Sequence[Path]) -> None:
    """Turn finished parts into the ArrayRecord data set in `data_dir`."""
    builder = SelfDistilled(parts=parts, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()


class AnswerSource:
    """Random access to a self-distilled set together with the pictures it refers to."""

    def __init__(self, data_dir: Path, pictures: Sequence[dict]):
        folder = Path(data_dir) / SelfDistilled.name
        if not folder.exists():
            raise FileNotFoundError(f"no self-distilled answers in {data_dir}; make them with configs/demo_answers.py")
        self.records = SelfDistilled(data_dir=str(data_dir), file_format="array_record").as_data_source("train")
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        return {**record, "images": self.pictures[int(record["picture"])]["images"]}


class AnswerEncoder:
    """Records of an `AnswerSource` for `jaxspec.data.pipeline.Pipeline`, as the target reads them."""

    def __init__(self, processor, config: TargetConfig):
        self.processor, self.config = processor, config

    def encode_record(self, record: dict) -> Example:
        prompt, answer = np.asarray(record["prompt_ids"]), np.asarray(record["answer_ids"])
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        inputs = {"input_ids": ids[None]}
        if record["images"]:
            inputs |= self.processor.image_processor(open_images(record["images"]), return_tensors="np")
        layouts = self.config.lay_out(inputs)
        encoded = EncodedPrompt(ids, layouts, self.config.position_ids(ids, layouts))
        return Example(encoded, np.arange(len(ids)) >= len(prompt))

    def length(self, record: dict) -> int:
        """How many tokens `encode_record` will give."""
        return len(record["prompt_ids"]) + len(record["answer_ids"])
