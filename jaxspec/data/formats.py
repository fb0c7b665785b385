"""Conversations as people store them, in one shape.

Files are a JSON list or JSON lines. Of a record the turns may stand under `conversations`, `messages` or `items`, a
turn's speaker under `from` or `role`, its words under `value` or `content` (a string, or a list of text and image
parts), its pictures under `image` or `images`: LLaVA-Pretrain, LLaVA's instruction mixes, ShareGPT and chat messages.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    text = path.read_text(encoding="utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return list(json_lines(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from error


def json_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold its other line breaks
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"line {number}: {error.msg}", error.doc, error.pos) from error


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
        number, pictures that are not there.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no JSON object but {type(record).__name__}")
    given = next((record[key] for key in ("conversations", "messages", "items") if record.get(key)), None)
    if not isinstance(given, list):
        raise ValueError("it has no turns")
    inline: list[str] = []
    turns = [standard_turn(turn, inline) for turn in given]
    if len(turns) > 1 and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if len(turns) > 1 and turns[-1]["from"] == "human":
        turns = turns[:-1]
    check_turns(turns)
    names = record.get("image") or record.get("images") or inline
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("its images are no paths")
    marks = sum(turn["value"].count(MARK) for turn in turns)
    if names and not marks:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{MARK}\n" * len(names) + first["value"]
    elif marks != len(names):
        raise ValueError(f"it has {marks} {MARK} marks for {len(names)} images")
    paths = [folder / name for name in names]
    for path in paths:
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long for any file
            raise ValueError(f"its image {path} does not exist")
    return {"id": str(record.get("id", number)), "images": list(map(str, paths)), "conversations": turns}


def standard_turn(turn: Any, inline: list[str]) -> dict[str, str]:
    """One turn; the pictures that its parts name are appended to `inline`."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is no JSON object but {type(turn).__name__}")
    speaker, words = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"a turn is by {speaker!r}; known: {', '.join(ROLES)}")
    if isinstance(words, list):
        words = "".join(part_text(part, inline) for part in words)
    if not isinstance(words, str):
        raise ValueError(f"a turn's words are no string but {type(words).__name__}")
    return {"from": SPEAKERS[ROLES[speaker]], "value": words}


def part_text(part: Any, inline: list[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        inline += [part["image"]] if isinstance(part.get("image"), str) else []
        return MARK
    raise ValueError(f"a turn has a part of type {kind!r}; known: text, image")


def check_turns(turns: Sequence[dict[str, str]]) -> None:
    """Raises ValueError where turns do not alternate or an answer is empty or holds a picture."""
    speakers = [SPEAKERS.get(ROLES.get(turn["from"])) for turn in turns]
    spoken = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        shown = [turn["from"] for turn in turns[:8]] + ["..."] * (len(turns) > 8)
        raise ValueError(
            f"turns must alternate human and gpt and end with gpt, a system turn at most ahead; got {', '.join(shown)}"
        )
    for turn, speaker in zip(turns, speakers, strict=True):
        if speaker == "gpt" and not turn["value"].strip():
            raise ValueError("an answer is empty")
        if speaker != "human" and MARK in turn["value"]:
            raise ValueError(f"a {speaker} turn holds an {MARK} mark; only questions may")
