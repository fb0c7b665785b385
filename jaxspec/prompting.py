"""From what a user says (chat messages, images) to the arrays a target reads.

The folder's own chat template and processor decide every token and pixel; this module checks what goes in, so that bad
input is one clear sentence before anything is compiled.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxspec.media import ImageLike, open_images
from jaxspec.targets.processors import process
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.video import Video, as_video

Prompt = str | Sequence[dict]


def encode_prompt(target, prompt: Prompt, images: Sequence[ImageLike] = (), raw: bool = False) -> EncodedPrompt:
    """Apply the chat template (unless `raw`) and the processor.

    `prompt` is a string (one user turn, images first), or chat messages in OpenAI's shape whose `image` and `video`
    parts carry one or take `images` in order and whose `image_url` parts carry a data: URL; with `raw` a string that
    has the family's own image marks. `images` may hold a `Video`. Raises ValueError for images that cannot be read and
    for marks and images that do not match in number.
    """
    images = list(images)
    if raw:
        if not isinstance(prompt, str):
            raise ValueError(f"a raw prompt must be a string, got {type(prompt).__name__}")
        text = prompt
    else:
        messages, images = normalise_messages(prompt, images)
        text = target.processor.apply_chat_template(messages, add_generation_prompt=True)
    stills = [each for each in images if not isinstance(each, Video)]
    pictures = open_images(stills)
    videos = [each for each in images if isinstance(each, Video)]
    given = {"images": (target.image_token, pictures), "videos": (target.video_token, videos)}
    for noun, (mark, things) in given.items():
        if mark is None and things:
            raise ValueError(f"this target reads no {noun}, {len(things)} were given")
        marks = text.count(mark) if mark else 0
        if marks != len(things):
            raise ValueError(f"the prompt has {marks} {mark} marks but {len(things)} {noun} were given")
    arguments = {"images": pictures} if pictures else {}
    if videos:
        arguments["videos"] = [(video.pictures(f"video {number}"), video.fps) for number, video in enumerate(videos, 1)]
    inputs = process(target.processor, text, **arguments)
    ids = np.asarray(inputs["input_ids"][0], np.int32)
    layouts = target.config.lay_out(inputs)
    return EncodedPrompt(ids, layouts, target.config.position_ids(ids, layouts))


def normalise_messages(prompt: Prompt, images: list) -> tuple[list[dict], list]:
    """Messages whose content is a list of `text`, `image` and `video` parts, and the images in their order."""
    if isinstance(prompt, str):
        content = [{"type": kind_of(image)} for image in images] + [{"type": "text", "text": prompt}]
        return [{"role": "user", "content": content}], images
    waiting, ordered, messages = list(images), [], []
    for message in prompt:
        kept = []
        for part in content_parts(message):
            if part["type"] == "text":
                kept.append({"type": "text", "text": part["text"]})
                continue
            if part["type"] == "image_url":
                image = image_url(part)
            elif part["type"] in part:
                image = part[part["type"]]
            elif waiting:
                image = waiting.pop(0)
            else:
                raise ValueError(f"the messages have more image parts than the {len(images)} images given")
            ordered.append(as_video(image) if part["type"] == "video" else image)
            kept.append({"type": kind_of(ordered[-1])})
        messages.append({"role": message["role"], "content": kept})
    if waiting:
        raise ValueError(f"{len(images)} images were given but the messages have {len(images) - len(waiting)} for them")
    return messages, ordered


def kind_of(image: ImageLike | Video) -> str:
    return "video" if isinstance(image, Video) else "image"


def content_parts(message: dict) -> list[dict]:
    """The parts of one message, each of a known type and with the fields that its type needs."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a dict with role and content, got {type(message).__name__}")
    if "role" not in message or "content" not in message:
        raise ValueError(f"a message needs role and content, got keys {', '.join(map(str, message))}")
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content must be a string or a list of parts, got {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind not in ("text", "image", "image_url", "video"):
            raise ValueError(f"content part type {kind!r} is not supported; use text, image, image_url or video")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"a text part needs text, a string; got {part.get('text')!r}")
    return list(content)


def image_url(part: dict) -> str:
    """The data: URL of an `image_url` part. Anything else is refused: a client's message must not open local files."""
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, Mapping) else None
    if not isinstance(url, str):
        raise ValueError(f'an image_url part needs image_url: {{"url": "data:..."}}, got {str(holder)[:40]}')
    if not url.startswith("data:"):
        raise ValueError(f"image_url must hold a data: URL, got {url[:40]!r}")
    return url
