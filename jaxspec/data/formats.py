"""Conversations as people store them, in one shape.

Files are a JSON list or JSON lines. Of a record the turns may stand under `conversations`, `messages` or `items`, a
turn's speaker under `from` or `role`, its words under `value` or `content` (a string, or a list of text and image
parts), its pictures under `image` or `images`: LLaVA-Pretrain, LLaVA's instruction mixes, ShareGPT and chat messages.

`standard_record` reads a conversation to learn from; a turn, its pictures and names are read here for
`jaxspec.data.prompts`, too. Whatever JSON can hold is read or refused by a ValueError.
"""

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.checks import encodable

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
MARK = "<image>"
"""What stands for a picture in a turn's words."""


def read_records(path: Path) -> list[Any]:
    """What a JSON list or a file of JSON lines holds, unchecked.

    Raises FileNotFoundError where there is no such file, ValueError where it is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return parse_json(text, "the list") if text.lstrip().startswith("[") else list(json_lines(text))
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from error


def json_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold its other line breaks
        if line.strip():
            yield parse_json(line, f"line {number}")


def parse_json(content: str | bytes, name: str) -> Any:
    """Raises ValueError, with that name, for what is no text, not JSON, or too deep for Python's parser."""
    try:
        return json.loads(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def name_of(record: Any, otherwise: str) -> str:
    """The record's id, as it is."""
    given = record.get("id") if isinstance(record, Mapping) else None
    return str(given) if isinstance(given, str | int | float) else otherwise


def printable(text: str) -> str:
    """What UTF-8 cannot hold is escaped."""
    return text.encode(errors="backslashreplace").decode()


def standard_record(record: Any, number: int, folder: Path) -> dict[str, Any]:
    """A record as {"id": str, "images": paths in the order of their marks, "conversations": turns {"from", "value"}}.

    Turns alternate "human" and "gpt", the human first, behind at most one "system" turn. As usual for ShareGPT, whose
    long conversations are cut into pieces, an answer without its question at the beginning and a question without its
    answer at the end are left out. Pictures that no turn marks stand at the beginning of the first question.

    Args:
      number: its place in the file, its id where it has none.
      folder: where its pictures' paths start.

    Raises:
      ValueError: no turns, unknown speakers, no alternation, an empty or no answer, marks and pictures that differ in
        number, pictures that are not there, a text, path or id that UTF-8 cannot hold.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no JSON object but {type(record).__name__}")
    given = next((record[key] for key in ("conversations", "messages", "items") if record.get(key)), None)
    if not isinstance(given, list):
        raise ValueError("it has no turns")
    read = [standard_turn(turn) for turn in given]
    if len(read) > 1 and read[0][0]["from"] == "gpt":
        read = read[1:]
    if len(read) > 1 and read[-1][0]["from"] == "human":
        read = read[:-1]
    turns = [turn for turn, _ in read]
    check_turns(turns)
    marks = [own for _, marked in read for own in marked]
    names = image_paths(record, marks)
    if names and not marks:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{MARK}\n" * len(names) + first["value"]
    paths = [folder / name for name in names]
    for path in paths:
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long for any file
            raise ValueError(f"its image {path} does not exist")
    name = encodable(name_of(record, str(number)), "its id")
    return {"id": name, "images": list(map(str, paths)), "conversations": turns}


def standard_turn(turn: Any) -> tuple[dict[str, str], list[str | None]]:
    """One turn, and for each of its marks the path that stands there."""
    role, words = read_turn(turn)
    parts = [{"type": "text", "text": words}] if isinstance(words, str) else words
    value, marked = "", []
    for part in parts:
        text = part.get("text", MARK)
        value += text
        marked += [part.get("image")] * text.count(MARK)
    return {"from": SPEAKERS[role], "value": value}, marked


def read_turn(turn: Any) -> tuple[str, str | list[dict[str, str]]]:
    """Who speaks (`user`, `assistant` or `system`), and the words: a string, or parts {"type": "text", "text"} and
    {"type": "image"}, the latter with a path under "image" if they have one of their own.

    Raises ValueError for anything else.
    """
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn is no JSON object but {type(turn).__name__}")
    speaker, words = first_given(turn, "from", "role"), first_given(turn, "value", "content")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"a turn is by {reprlib.repr(speaker)}; known: {', '.join(ROLES)}")
    if not isinstance(words, str | list):
        raise ValueError(f"a turn's words must be a string or a list of parts, got {type(words).__name__}")
    return ROLES[speaker], words if isinstance(words, str) else [read_part(part) for part in words]


def first_given(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def read_part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and isinstance(part.get("image") or "", str):
        return {"type": "image", **({"image": part["image"]} if part.get("image") else {})}
    raise ValueError(f"a content part must be a text, or an image by its path; got {reprlib.repr(part)}")


def image_paths(record: Mapping[str, Any], marks: Sequence[str | None]) -> list[str]:
    """The record's pictures in the order of their marks: each has a path of its own or (None) takes the next of those
    under `image` or `images`. Without marks, all of these.

    Raises ValueError for pictures that are no paths, and where marks and pictures differ in number.
    """
    given = [[value] if isinstance(value, str) else value for value in map(record.get, ("image", "images")) if value]
    names = given[0] if given else []
    if given[1:] and given[1] != names:
        raise ValueError("its image and its images are not the same")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"images must be paths, got {reprlib.repr(names)}")
    if marks and list(marks) != names:
        waiting = marks.count(None)
        if waiting != len(names):
            others = f" (beside {len(marks) - waiting} that name their own)" if waiting < len(marks) else ""
            raise ValueError(f"it has {waiting} {MARK} marks{others} for {len(names)} images")
        rest = iter(names)
        names = [own or next(rest) for own in marks]
    return [encodable(name, "an image's path") for name in names]


def check_turns(turns: Sequence[dict[str, str]]) -> None:
    """Raises ValueError where turns do not alternate, an answer is empty or holds a picture, or UTF-8 cannot hold a
    text."""
    speakers = [SPEAKERS.get(ROLES.get(turn["from"], "")) for turn in turns]
    spoken = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        shown = [turn["from"] for turn in turns[:8]] + ["..."] * (len(turns) > 8)
        raise ValueError(
            f"turns must alternate human and gpt and end with gpt, a system turn at most ahead; got {', '.join(shown)}"
        )
    for turn, speaker in zip(turns, speakers, strict=True):
        encodable(turn["value"], f"a {speaker} turn")
        if speaker == "gpt" and not turn["value"].strip():
            raise ValueError("an answer is empty")
        if speaker != "human" and MARK in turn["value"]:
            raise ValueError(f"a {speaker} turn holds an {MARK} mark; only questions may")
