"""From what a user says (chat messages, images) to the arrays a target reads.

The folder's own chat template and processor decide every token and pixel; this module checks what goes in, so that bad
input is one clear sentence before anything is compiled.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxspec.targets.images import ImageLayout

ImageLike = Any  # PIL.Image.Image, path, bytes, uint8 array [H, W, 3], data: URL
Prompt = str | Sequence[dict]
MAX_PIXELS = 64_000_000
"""Images with more pixels are refused from their header, before they are decoded."""


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One request as arrays on the host."""

    input_ids: np.ndarray  # i32 [S], image marks expanded to image tokens
    images: list[ImageLayout]
    position_ids: np.ndarray | None = None  # i32 [3, S] where the family has positions of its own


def encode_prompt(target, prompt: Prompt, images: Sequence[ImageLike] = (), raw: bool = False) -> EncodedPrompt:
    """Apply the chat template (unless `raw`) and the processor.

    `prompt` is a string (one user turn, images first), or chat messages in OpenAI's shape whose `image` parts take
    `images` in order and whose `image_url` parts carry a data: URL; with `raw` a string that has the family's own image
    marks. Raises ValueError for images that cannot be read and for marks and images that do not match in number.
    """
    images = list(images)
    if raw:
        if not isinstance(prompt, str):
            raise ValueError(f"a raw prompt must be a string, got {type(prompt).__name__}")
        text = prompt
    else:
        messages, images = normalise_messages(prompt, images)
        text = target.processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [open_image(image, number) for number, image in enumerate(images, 1)]
    if target.image_token is None and pictures:
        raise ValueError(f"this target reads no images, {len(pictures)} were given")
    marks = text.count(target.image_token) if target.image_token else 0
    if marks != len(pictures):
        raise ValueError(f"the prompt has {marks} {target.image_token} marks but {len(pictures)} images were given")
    inputs = target.processor(text=[text], images=pictures or None, return_tensors="np")
    ids = np.asarray(inputs["input_ids"][0], np.int32)
    images = target.config.lay_out(inputs)
    return EncodedPrompt(ids, images, target.config.position_ids(ids, images))


def normalise_messages(prompt: Prompt, images: list) -> tuple[list[dict], list]:
    """Messages whose content is a list of `text` and `image` parts, and the images in the order of those parts."""
    if isinstance(prompt, str):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        return [{"role": "user", "content": content}], images
    waiting, ordered, messages = list(images), [], []
    for message in prompt:
        kept = []
        for part in content_parts(message):
            if part["type"] == "text":
                kept.append({"type": "text", "text": part["text"]})
                continue
            kept.append({"type": "image"})
            if part["type"] == "image_url":
                ordered.append(image_url(part))
            elif "image" in part:
                ordered.append(part["image"])
            elif waiting:
                ordered.append(waiting.pop(0))
            else:
                raise ValueError(f"the messages have more image parts than the {len(images)} images given")
        messages.append({"role": message["role"], "content": kept})
    if waiting:
        raise ValueError(f"{len(images)} images were given but the messages have {len(images) - len(waiting)} for them")
    return messages, ordered


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
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"content part type {kind!r} is not supported; use text, image or image_url")
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


def open_image(image: ImageLike, number: int = 1) -> Image.Image:
    """An RGB picture. Raises ValueError, naming the image, where it is missing, unreadable, empty or too large."""
    name = f"image {number}"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"{name} has dtype {image.dtype}; give uint8")
        if 0 in image.shape:
            raise ValueError(f"{name} is empty: shape {image.shape}")
        if image.ndim not in (2, 3):
            raise ValueError(f"{name} has shape {image.shape}; give [H, W, 3], or [H, W] for greys")
    elif isinstance(image, str) and image.startswith("data:"):
        image = data_url_bytes(image, name)
    elif isinstance(image, str | Path):
        name = f"image {number} ({image})"
        if not os.path.isfile(image):
            raise ValueError(f"{name} does not exist")
    elif not isinstance(image, Image.Image | bytes):
        raise ValueError(f"{name} has type {type(image).__name__}; give a PIL image, a path, bytes or an array")
    with readable(name):
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS}")
    with readable(name):
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 and leave a white picture
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


@contextlib.contextmanager
def readable(name: str):
    """Whatever Pillow raises over a damaged file becomes a ValueError that names the image."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; the limit is {MAX_PIXELS}") from error
    except Exception as error:  # its parsers raise OSError, SyntaxError, ValueError, struct.error, IndexError, ..
        raise ValueError(f"{name} cannot be read: {error}") from error


def data_url_bytes(url: str, name: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"{name} is a data: URL that is not base64")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not valid base64: {error}") from error
