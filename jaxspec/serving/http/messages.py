"""From the messages of a request to an encoded prompt: media fetched, opened and counted, words tokenised.

Fetching waits on the event loop; pictures and tokens are made in a few threads, so that no request holds up the streams
of others.
"""

import asyncio
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxspec.detokenizer import TokenReader
from jaxspec.media import open_image
from jaxspec.prompting import encode_prompt
from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.media import RemoteMedia
from jaxspec.serving.http.parameters import naming
from jaxspec.serving.http.schema import ChatMessage, ImagePart, TextPart, VideoPart
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target
from jaxspec.video import Video, VideoLimits, as_video

COMPOSED = 4
"""Most characters that a tokenizer's normaliser makes one of (Unicode's composition)."""
FETCHES = 8
"""Files that are fetched at a time."""
VIDEO = VideoLimits(frame_pixels=9_000_000, frames=20_000, decoded_pixels=20_000_000_000)
"""What a video file may have, whatever is taken of it. A frame of 4K has 8.3 million pixels, and that many in all hold
up a thread for a minute or two; of those that are taken `HttpSettings.max_pixels` tells."""


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video of a request."""

    kind: str  # "image" or "video"
    number: int  # among its kind, from 1
    url: str
    param: str  # where it stands in the body

    @property
    def name(self) -> str:
        """What sentences call it."""
        return f"{self.kind} {self.number}"


class Encoder:
    """Makes the prompts of a target. `close` ends its threads.

    Args:
      target: of the engine.
      max_length: the engine's: most tokens of prompt and answer together.
      settings: limits of images and videos, allowed domains, number of threads.
    """

    def __init__(self, target: Target, max_length: int, settings: HttpSettings) -> None:
        self.target, self.max_length, self.settings = target, max_length, settings
        self.remote = RemoteMedia(settings.allowed_media_domains)
        self.pool = ThreadPoolExecutor(settings.encode_threads, "jaxspec-encode")
        self._fetches = asyncio.Semaphore(FETCHES)
        self._most_characters = most_characters(target.tokenizer, max_length)

    def close(self) -> None:
        """Lets what runs end, and takes no more."""
        self.pool.shutdown(cancel_futures=True)

    async def encode(self, messages: Sequence[ChatMessage]) -> EncodedPrompt:
        """The prompt that the messages are. Raises ApiError for what the target or the server does not read."""
        media = list(media_of(messages))
        self.check_media(media)
        try:
            async with asyncio.TaskGroup() as group:  # where one cannot be had, the others are not waited for
                fetched = [group.create_task(self.content(medium)) for medium in media]
        except ExceptionGroup as refusals:
            raise refusals.exceptions[0] from None
        contents = [task.result() for task in fetched]
        return await asyncio.get_running_loop().run_in_executor(self.pool, self.encoded, messages, media, contents)

    async def encode_question(self, question: str, picture: bytes | None) -> EncodedPrompt:
        """The prompt of one turn, about the picture if there is one. Raises ApiError and ValueError as `encode`."""

        def encoded() -> EncodedPrompt:
            self.check_characters([question])
            opened = [] if picture is None else [open_image(picture, "the picture")]
            self.check_pixels(sum(image.width * image.height for image in opened), None)
            return self.of_a_length(encode_prompt(self.target, question, opened))

        return await asyncio.get_running_loop().run_in_executor(self.pool, encoded)

    def check_media(self, media: Sequence[Medium]) -> None:
        """Raises ApiError for more media than the server takes, and for a kind that the target does not read."""
        adapter, processor = self.target.adapter, self.target.processor
        for kind, limit, mark in (
            ("image", self.settings.max_images, adapter.image_mark(processor)),
            ("video", self.settings.max_videos, adapter.video_mark(processor)),
        ):
            found = [each for each in media if each.kind == kind]
            if found and mark is None:
                raise ApiError(400, f"this model reads no {kind}s", found[0].param, "unsupported_value")
            if len(found) > limit:
                sentence = f"a prompt may have at most {limit} {kind}s, this one has {len(found)}"
                raise ApiError(400, sentence, found[limit].param, f"too_many_{kind}s")

    async def content(self, medium: Medium) -> str | bytes:
        """A data: URL as it is, anything else as what is behind it."""
        if medium.url.startswith("data:"):
            return medium.url
        with naming(medium.param):
            async with self._fetches:
                return await self.remote.fetch(medium.url, medium.name)

    def encoded(
        self, messages: Sequence[ChatMessage], media: Sequence[Medium], contents: Sequence[str | bytes]
    ) -> EncodedPrompt:
        """`encode`, once everything is here."""
        self.check_characters(texts_of(messages))
        opened, pixels = [], 0
        for medium, content in zip(media, contents, strict=True):
            with naming(medium.param):
                opened.append(opened_medium(medium, content, self.settings.max_pixels - pixels))
            frames = opened[-1].frames if medium.kind == "video" else opened[-1:]
            pixels += sum(frame.width * frame.height for frame in frames)
            self.check_pixels(pixels, medium.param)
        with naming("messages"):
            prompt = encode_prompt(self.target, plain_messages(messages, iter(opened)))
        return self.of_a_length(prompt)

    def of_a_length(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """The prompt itself. Raises ApiError where it leaves no room for an answer."""
        if len(prompt.input_ids) >= self.max_length:
            raise too_long(f"the prompt has {len(prompt.input_ids)} tokens", self.max_length)
        return prompt

    def check_pixels(self, pixels: int, param: str | None) -> None:
        """Raises ApiError for more pixels than a prompt may have."""
        if pixels > self.settings.max_pixels:
            sentence = f"the images of a prompt may have {self.settings.max_pixels} pixels together, at most"
            raise ApiError(400, sentence, param, "too_many_pixels")

    def check_characters(self, texts: Iterable[str]) -> None:
        """Raises ApiError for words that are too many however they are cut into tokens, which takes time."""
        if self._most_characters is None:
            return
        count = sum(len(word) for text in texts for word in text.split())
        if count > self._most_characters:
            raise too_long(f"the prompt has {count} characters, more tokens than fit", self.max_length)


def too_long(sentence: str, max_length: int) -> ApiError:
    """The refusal of a prompt that leaves no room for an answer."""
    sentence += f"; with a maximum length of {max_length} tokens it may have at most {max_length - 1}"
    return ApiError(400, sentence, "messages", "context_length_exceeded")


def most_characters(tokenizer: Any, max_length: int) -> int | None:
    """How many characters, spaces not counted, so many tokens spell at most; None for a tokenizer that may leave
    characters out. Templates strip spaces, tokenizers join them."""
    reader = TokenReader(tokenizer)
    if not (reader.byte_level or reader.byte_fallback):
        return None
    return COMPOSED * max_length * max(map(len, tokenizer.get_vocab()))


def texts_of(messages: Sequence[ChatMessage]) -> Iterator[str]:
    for message in messages:
        if isinstance(message.content, str):
            yield message.content
        else:
            yield from (part.text for part in message.content if isinstance(part, TextPart))


def media_of(messages: Sequence[ChatMessage]) -> Iterator[Medium]:
    """The images and videos of a request in reading order."""
    counts = {"image": 0, "video": 0}
    for row, message in enumerate(messages):
        parts = () if isinstance(message.content, str) else message.content
        for place, part in enumerate(parts):
            match part:
                case ImagePart(image_url=holder):
                    kind, url = "image", holder.url
                case VideoPart(video_url=holder):
                    kind, url = "video", holder.url
                case _:
                    continue
            counts[kind] += 1
            yield Medium(kind, counts[kind], url, f"messages.{row}.content.{place}.{part.type}")


def opened_medium(medium: Medium, content: str | bytes, most_pixels: int) -> Any:
    """A picture, or a `Video` of which so many pixels may be taken. Raises ValueError."""
    if medium.kind == "video":
        return as_video(content, dataclasses.replace(VIDEO, kept_pixels=most_pixels))
    return open_image(content, medium.name)


def plain_messages(messages: Sequence[ChatMessage], opened: Iterator[Any]) -> list[dict]:
    """The messages as `encode_prompt` takes them, with their media in them."""
    made = []
    for message in messages:
        content: Any = message.content
        if not isinstance(content, str):
            content = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    medium = next(opened)
                    kind = "video" if isinstance(medium, Video) else "image"
                    content.append({"type": kind, kind: medium})
        made.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return made
