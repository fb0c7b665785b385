"""Prompts to be answered: LLaVA's JSON, JSON lines, tensorflow-datasets and the demo's scenes, as one kind of record.

A prompt source is a random-access sequence of dicts in the shape of LLaVA's JSON: `conversations` (or `prompt`, or
`messages` in OpenAI's shape), `image` or `images` as text references, and an optional `id`. Reading a record says what
is wrong with it, so that one broken record is one line in a list and not the end of a long run.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxspec.checks import encodable
from jaxspec.data.formats import MARK, image_paths, name_of, parse_json, read_turn
from jaxspec.data.pictures import SCENES, is_prepared, open_records
from jaxspec.data.records import Records
from jaxspec.data.scenes import JaxspecScenesConfig
from jaxspec.demo.generation import SPLITS, conversation_of, numbered_scene

PROMPT_FIELDS = ("prompt", "messages", "conversations")
SUFFIXES = {
    "vispec": " Please answer with at least 1000 words.",
    "specvlm": "Please give a detailed and reasonable explanation for the answer.",
}
"""Published endings that make a target answer at length: ViSpec's training set, SpecVLM's evaluation prompts."""
SHORT_ANSWERS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""LLaVA's requests for short answers, which SpecVLM's ending replaces."""


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """Records as they are stored, where their images are, and what the source is known by."""

    records: Records[Any]
    identity: str  # of a file its name and a hash of its content; of a prepared set its path, split and record count
    image_folder: Path | None  # None where the images need no folder: scenes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a user says; the answers are for the target to give."""

    id: str
    system: tuple[dict[str, Any], ...]  # messages ahead of the first turn
    turns: tuple[list[dict[str, str]], ...]  # parts of each user turn, {"type": "image"} or {"type": "text", ..}
    images: tuple[str, ...]  # a reference for each image part


def open_prompts(data: str, split: str = "train", image_folder: str | Path | None = None) -> PromptSource:
    """The source of that name.

    Args:
      data: a LLaVA .json or a .jsonl file; `scenes`; the folder of a prepared tensorflow-datasets set, or its name.
      split: of scenes and tensorflow-datasets; a file has none.
      image_folder: what the image paths of a file are relative to; the file's own folder by default.

    Raises:
      FileNotFoundError: no such file, folder or data set.
      ValueError: a file that is not JSON or has no records, an unknown split, a split or an image folder that
        nothing needs.
    """
    path = Path(data).expanduser()
    is_file = path.suffix in (".json", ".jsonl")
    if image_folder is not None and not is_file:
        raise ValueError(f"image_folder is for .json and .jsonl files; {data!r} brings its images along")
    if split != "train" and is_file:
        raise ValueError(f"split is for scenes and tensorflow-datasets; {data!r} has no split {split!r}")
    if data == SCENES:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return PromptSource(SceneRecords(split), f"{SCENES}/{split}", None)
    if not is_file:
        folder = path if is_prepared(path) else prepared_folder(data)
        records = TfdsRecords(folder, split)
        return PromptSource(records, f"{folder.resolve()} {split}, {len(records)} records", folder.resolve())
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    folder = Path(image_folder).expanduser() if image_folder is not None else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}")
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        records: Records[Any] = JsonLines(content)
    else:
        records = parse_json(content, str(path))
        if not isinstance(records, list):
            raise ValueError(f"{path} must hold a list of records, got {type(records).__name__}")
    if not len(records):
        raise ValueError(f"{path} has no records")
    return PromptSource(records, f"{path.name} {hashlib.sha256(content).hexdigest()[:16]}", folder.resolve())


class JsonLines:
    """One JSON object per line, parsed when it is asked for."""

    def __init__(self, content: bytes) -> None:
        self.lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        number, line = self.lines[index]
        return parse_json(line, f"line {number}")


class SceneRecords:
    """The numbered scenes of the demo, made when they are asked for; as many as the `jaxspec_scenes` set holds."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.count: int = getattr(JaxspecScenesConfig(), f"{split}_size")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        reference = f"{SCENES}/{self.split}/{index}"
        _, turns = numbered_scene(self.split, index)
        return {"id": reference, "conversations": conversation_of(turns), "images": [reference]}


class TfdsRecords:
    """A prepared set with the features `prompt` or `question` (text), or `conversations` or `messages` (JSON as text),
    and perhaps `image` and `id`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.records, self.split = open_records(folder, split), split

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, reference = self.records[index], f"{self.split}/{index}"
        made: dict[str, Any] = {"id": str(as_text(record.get("id", reference)))}
        made["images"] = [reference] if "image" in record else []
        for field in ("prompt", "question"):
            if field in record:
                made["prompt"] = as_text(record[field])
        for field in ("conversations", "messages"):
            if field in record:
                made[field] = parse_json(as_text(record[field]), field)
        return made


def as_text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def prepared_folder(name: str) -> Path:
    """Where tensorflow-datasets has prepared the set NAME or NAME/CONFIG; its own code is not asked, which may need
    TensorFlow."""
    name, _, config = name.partition("/")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, config=config or None)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is no .json or .jsonl file, not {SCENES!r}, and no data set that tensorflow-datasets has "
            "prepared (its own folder or TFDS_DATA_DIR)"
        ) from error
    return Path(builder.data_path)


def read_conversation(record: Any, index: int) -> Conversation:
    """What a record asks. Raises ValueError, saying what is wrong with it."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, got {type(record).__name__}")
    given = [field for field in PROMPT_FIELDS if record.get(field) is not None]
    if len(given) != 1:
        raise ValueError(f"a record needs one of {', '.join(PROMPT_FIELDS)}; it has {', '.join(given) or 'none'}")
    system, turns = [], []
    for role, content in messages_of(given[0], record[given[0]]):
        check_content(role, content)
        if role == "system":
            system.append({"role": role, "content": content})
        elif role == "user":
            turns.append(content)
    if not turns:
        raise ValueError("the record has no user turn")
    marks = [part for turn in turns for part in turn if part["type"] == "image"]
    images = image_paths(record, [part.pop("image", None) for part in marks])
    if not marks:  # as for `Generator.generate`, images come first
        turns[0] = [{"type": "image"} for _ in images] + turns[0]
    name = encodable(name_of(record, f"record {index}"), "its id")
    return Conversation(name, tuple(system), tuple(turns), tuple(images))


def messages_of(field: str, value: Any) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(role, content parts) of each message."""
    if field == "prompt":
        if not isinstance(value, str):
            raise ValueError(f"a prompt must be text, got {type(value).__name__}")
        yield "user", text_parts(value)
        return
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a list of turns, got {type(value).__name__}")
    for turn in value:
        role, words = read_turn(turn)
        if isinstance(words, str):
            yield role, text_parts(words)
        else:
            marked = (text_parts(part["text"]) if MARK in part.get("text", "") else [part] for part in words)
            yield role, [part for parts in marked for part in parts]


def check_content(role: str, content: list[dict[str, str]]) -> None:
    """Raises ValueError for a question without words, an image in another's turn, a text that UTF-8 cannot hold."""
    texts = [part["text"] for part in content if part["type"] == "text"]
    for text in texts:
        encodable(text, f"a turn by {role}")
    if role == "user" and not any(texts):
        raise ValueError("a user turn has no text")
    if role != "user" and len(texts) < len(content):
        raise ValueError(f"a turn by {role} holds an image; only those by user may")


def text_parts(text: str) -> list[dict[str, str]]:
    """A text with `<image>` marks as content parts, the images ahead of the text."""
    images = [{"type": "image"} for _ in range(text.count(MARK))]
    return [*images, {"type": "text", "text": text.replace(MARK, "").strip()}]


def with_suffix(content: list[dict[str, str]], suffix: str) -> list[dict[str, str]]:
    """A user turn that ends in a suffix: one of `SUFFIXES` by name, or any text as it is.

    SpecVLM's takes the place of a request for a short answer and is a sentence of its own otherwise.
    """
    if not suffix:
        return content
    at = max(index for index, part in enumerate(content) if part["type"] == "text")
    text = content[at]["text"]
    if suffix == "specvlm":
        for short in SHORT_ANSWERS:
            text = text.replace(short, "")
        text = text.rstrip() + "\n" if text.strip() else ""
    return [*content[:at], {"type": "text", "text": text + SUFFIXES.get(suffix, suffix)}, *content[at + 1 :]]
