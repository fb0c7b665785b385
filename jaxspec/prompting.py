"""From what a user says (chat messages, images) to the arrays a target reads.

The folder's own chat template and processor decide every token and pixel; this module checks what goes in, so that bad
input is one clear sentence before anything is compiled. Messages may be a stranger's: their words are text whatever
they spell (jaxspec/targets/words.py), and they open no file unless the caller says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.arguments import check_prompt, image_list
from jaxspec.checks import encodable
from jaxspec.media import ImageLike, open_images
from jaxspec.targets.processors import process, render
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target
from jaxspec.targets.words import guard_messages
from jaxspec.video import Video, as_video

Prompt = str | Sequence[dict]
EMPTY = "the prompt is empty; give a text, or messages with some content"


def encode_prompt(
    target: Target,
    prompt: Prompt,
    images: Sequence[ImageLike | Video] = (),
    raw: bool = False,
    allow_local_files: bool = False,
) -> EncodedPrompt:
    """Apply the chat template (unless `raw`) and the processor.

    `prompt` is a string (one user turn, images first), or chat messages in OpenAI's shape whose `image` and `video`
    parts carry one or take `images` in order and whose `image_url` parts carry a data: URL; with `raw` a string that
    has the family's own image marks. `images` may hold a `Video` and paths; a path within a message is opened with
    `allow_local_files` only. The words of a string or a message are text, also where they spell a control token or the
    mark of an image; in a raw prompt they are that token.

    Raises ValueError for an empty prompt, images that cannot be read, marks and images that do not match in number or
    an image with another number of tokens than features, tokens outside the embedding, and whatever the template or the
    processor refuses.
    """
    images = image_list(images)
    if raw:
        if not isinstance(prompt, str):
            raise ValueError(f"a raw prompt must be a string, got {type(prompt).__name__}")
        if not prompt:
            raise ValueError(EMPTY)
        text = encodable(prompt, "the prompt")
    else:
        messages, images = normalise_messages(prompt, images, allow_local_files)
        text = render(target.processor, guard_messages(target.processor, messages))
    stills = [each for each in images if not isinstance(each, Video)]
    pictures = open_images(stills)
    videos = [each for each in images if isinstance(each, Video)]
    adapter, processor = target.adapter, target.processor
    given = {"images": (adapter.image_mark(processor), pictures), "videos": (adapter.video_mark(processor), videos)}
    for noun, (mark, things) in given.items():
        if mark is None and things:
            raise ValueError(f"this target reads no {noun}, {len(things)} were given")
        marks = text.count(mark) if mark else 0
        if marks != len(things):
            raise ValueError(f"the prompt has {marks} {mark} marks but {len(things)} {noun} were given")
    arguments: dict[str, Any] = {"images": pictures} if pictures else {}
    if videos:
        arguments["videos"] = [(video.pictures(f"video {number}"), video.fps) for number, video in enumerate(videos, 1)]
    inputs = process(processor, text, **arguments)
    ids = np.asarray(inputs["input_ids"][0], np.int64)  # of no tokens numpy would make floats
    return EncodedPrompt.of(adapter, ids, adapter.lay_out(inputs), processor.tokenizer)


def normalise_messages(
    prompt: Prompt, images: list[ImageLike | Video], allow_local_files: bool = False
) -> tuple[list[dict], list[ImageLike | Video]]:
    """Messages whose content is a list of `text`, `image` and `video` parts, and the images in their order."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(EMPTY)
        encodable(prompt, "the prompt")
        content = [{"type": kind_of(image)} for image in images] + [{"type": "text", "text": prompt}]
        return [{"role": "user", "content": content}], images
    check_prompt(prompt, "the prompt")
    waiting, ordered, messages, empty = list(images), [], [], True
    for message in prompt:
        kept = []
        for part in content_parts(message):
            empty = empty and part["type"] == "text" and not part["text"].strip()
            if part["type"] == "text":
                kept.append({"type": "text", "text": encodable(part["text"], f"a text by {message['role']}")})
                continue
            if part["type"] == "image_url":
                image = image_url(part)
            elif part["type"] in part:
                image = part[part["type"]]
                if not allow_local_files:
                    refuse_files(image, part["type"])
            elif waiting:
                image = waiting.pop(0)
            else:
                raise ValueError(f"the messages have more image parts than the {len(images)} images given")
            ordered.append(as_video(image) if part["type"] == "video" else image)
            kept.append({"type": kind_of(ordered[-1])})
        messages.append({"role": message["role"], "content": kept})
    if waiting:
        raise ValueError(f"{len(images)} images were given but the messages have {len(images) - len(waiting)} for them")
    if empty:
        raise ValueError(EMPTY)
    return messages, ordered


def kind_of(image: ImageLike | Video) -> str:
    return "video" if isinstance(image, Video) else "image"


def content_parts(message: Any) -> list[dict]:
    """The parts of one message, each of a known type and with the fields that its type needs."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a dict with role and content, got {type(message).__name__}")
    if "role" not in message or "content" not in message:
        raise ValueError(f"a message needs role and content, got keys {', '.join(map(str, message)) or 'none'}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise ValueError(f"a message's role must be a string, got {type(role).__name__}")
    encodable(role, "a message's role")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise ValueError(f"a message's content must be a string or a list of parts, got {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(kind, str) or kind not in ("text", "image", "image_url", "video"):
            raise ValueError(f"content part type {kind!r} is not supported; use text, image, image_url or video")
        if not isinstance(part, Mapping):
            raise ValueError(f"a content part must be a dict with a type, got {part!r}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"a text part needs text, a string; got {part.get('text')!r}")
    return list(content)


def image_url(part: Mapping) -> str:
    """The data: URL of an `image_url` part. Anything else is refused: a client's message must not open local files."""
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, Mapping) else None
    if not isinstance(url, str):
        raise ValueError(f'an image_url part needs image_url: {{"url": "data:..."}}, got {str(holder)[:40]}')
    if not url.startswith("data:"):
        raise ValueError(f"image_url must hold a data: URL, got {url[:40]!r}")
    return url


def refuse_files(media: Any, kind: str) -> None:
    """Raises ValueError for a path as what an `image` or `video` part carries, also as a frame of a video."""
    frames = media.frames if isinstance(media, Video) else media
    for each in frames if isinstance(frames, Sequence) and not isinstance(frames, str | bytes) else [frames]:
        if isinstance(each, Path) or (isinstance(each, str) and not each.startswith("data:")):
            raise ValueError(
                f"a message's {kind} names a file, {str(each)[:40]!r}: a message opens none without allow_local_files; "
                "give its bytes, a data: URL, or the path in images"
            )
