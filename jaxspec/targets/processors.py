"""Processors where transformers' own cannot be had: text models have none, Qwen2.5-VL's wants torchvision for videos.

Both answer to what jaxspec asks of a processor: `apply_chat_template(messages, add_generation_prompt)` and, by
`process`, `processor(text=[..], images=[..], videos=[..], return_tensors="np", add_special_tokens=..)`, with images and
videos only where there are some.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import numpy as np
import transformers
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase

from jaxspec.checkpoints.tensors import read_json
from jaxspec.checks import reason
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.prompts import check_prompt
from jaxspec.targets.words import GUARD, GuardedTokenizer, control_tokens

VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
"""Pixels of a video's frame where a folder does not say, as in Qwen's own utilities."""
MAX_VIDEO_TOKENS = 128_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
MORE_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "video_preprocessor_config.json"),
)
"""Read where they are there."""
FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, no code of a folder is run (nor is it asked for at the terminal)."""


def render(processor: Any, messages: Sequence[dict], prompt: bool = True) -> str:
    """Chat messages as the folder's template writes them, up to where an answer begins if it is a `prompt`.

    `messages` have lists of parts as content, and guards in their words (`jaxspec.targets.words.guard_messages`).

    Raises ValueError where there is no template, where it is broken, and where it refuses the messages.
    """
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise ValueError("the target has no chat template (chat_template.jinja); give a raw prompt instead")
    with refusing("the chat template refuses the messages"):
        return processor.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False)


def process(processor: Any, text: str, **things: Any) -> BatchFeature:
    """What a processor makes of one text and the images and videos it marks; control tokens with a guard are text.

    Raises ValueError where the processor fails.
    """
    with refusing("the processor refuses the prompt"):
        return reader(processor, text)(
            text=[text], return_tensors="np", add_special_tokens=adds_special(processor.tokenizer, text), **things
        )


def reader(processor: Any, text: str) -> Any:
    """The processor, or for a text with guards one whose tokenizer reads these."""
    if GUARD not in text:
        return processor
    reading = copy.copy(processor)
    reading.tokenizer = GuardedTokenizer(processor.tokenizer, control_tokens(processor))
    return reading


@contextlib.contextmanager
def refusing(sentence: str) -> Generator[None]:
    """Whatever a folder's own template, processor or their files raise becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{sentence}: {reason(error).replace(GUARD, '')}") from error


def adds_special(tokenizer: PreTrainedTokenizerBase | GuardedTokenizer, text: str) -> bool:
    """Whether the tokenizer shall add its special tokens: not where the template has written the first one already."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


class TextProcessor:
    """A tokenizer in the role of a processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "TextProcessor":
        return cls(load_tokenizer(folder))

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = False, tokenize: bool = False
    ) -> Any:
        """Messages as `jaxspec.prompting` makes them; templates of text models want a string in place of parts."""
        flat = [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])} for message in messages
        ]
        return self.tokenizer.apply_chat_template(flat, add_generation_prompt=add_generation_prompt, tokenize=tokenize)

    def __call__(
        self, text: list[str], return_tensors: str = "np", add_special_tokens: bool = True
    ) -> transformers.BatchEncoding:
        return self.tokenizer(text, return_tensors=return_tensors, add_special_tokens=add_special_tokens)


class QwenProcessor:
    """Qwen2.5-VL's tokenizer and image processor; each `<|image_pad|>` or `<|video_pad|>` becomes as many as its image
    or video has tokens. Videos go through the image processor frame by frame, within `video_size`."""

    image_token: ClassVar[str] = "<|image_pad|>"
    video_token: ClassVar[str] = "<|video_pad|>"
    marks: ClassVar[tuple[str, str]] = (image_token, video_token)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        chat_template: str | None = None,
        video_size: dict[str, int] | None = None,
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        # A dict would be that of a folder with several templates, which Qwen's are not.
        self.chat_template: str | None = chat_template or tokenizer.chat_template  # pyrefly: ignore[bad-assignment]
        self.video_size = video_size or VIDEO_SIZE

    @classmethod
    def load(cls, folder: Path) -> "QwenProcessor":
        image_processor = transformers.AutoImageProcessor.from_pretrained(folder, **FROM_FOLDER)
        return cls(load_tokenizer(folder), image_processor, chat_template_of(folder), video_size_of(folder))

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = False, tokenize: bool = False
    ) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
        )

    def __call__(
        self,
        text: list[str],
        images: Sequence[Image.Image] | None = None,
        videos: Sequence[tuple[Sequence[Image.Image], float]] | None = None,
        return_tensors: str = "np",
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """`videos` are pairs of RGB frames of one size and frames per second. Beside what the image processor returns:
        `pixel_values_videos` f32 `[P, C]`, `video_grid_thw` `[n, 3]` and `second_per_grid_ts` `[n]`; and what
        transformers' own model wants, `mm_token_type_ids` `[B, S]`."""
        inputs = dict(self.image_processor(images, return_tensors="np")) if images else {}
        if videos:
            patches, grids = zip(*(self.video_patches(frames) for frames, _ in videos), strict=True)
            seconds = [self.image_processor.temporal_patch_size / fps for _, fps in videos]
            inputs["pixel_values_videos"] = np.concatenate(patches)
            inputs["video_grid_thw"], inputs["second_per_grid_ts"] = np.array(grids), np.array(seconds)
        merged = self.image_processor.merge_size**2
        for mark, grid in zip(self.marks, ("image_grid_thw", "video_grid_thw"), strict=True):
            counts = iter(np.prod(inputs.get(grid, np.zeros((0, 3))), axis=1) // merged)
            text = [spread_marks(each, mark, counts) for each in text]
        inputs |= self.tokenizer(text, return_tensors="np", add_special_tokens=add_special_tokens)
        kinds = [inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(mark) for mark in self.marks]
        inputs["mm_token_type_ids"] = kinds[0] + 2 * kinds[1].astype(np.int64)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def video_patches(self, frames: Sequence[Image.Image]) -> tuple[np.ndarray, list[int]]:
        """Patches `[t * h * w, C]` of one video, and its grid. The last frame is repeated to fill the last patch."""
        depth, side = self.image_processor.temporal_patch_size, self.image_processor.patch_size
        least, most = self.video_size["shortest_edge"], self.video_size["longest_edge"]
        budget = int(0.9 * MAX_VIDEO_TOKENS * (side * self.image_processor.merge_size) ** 2)
        share = max(budget * depth // len(frames), int(1.05 * least))  # a frame's, as Qwen's own utilities have it
        size = {"shortest_edge": least, "longest_edge": min(most, share)}
        made = self.image_processor(list(frames), size=size, return_tensors="np")
        _, height, width = made["image_grid_thw"][0].tolist()
        # An image is a patch that repeats it in time: of each frame the first of these is kept, side by side with the
        # next frames' ones.
        stills = made["pixel_values"].reshape(len(frames), height * width, 3, depth, -1)[:, :, :, 0]
        stills = np.concatenate([stills, *[stills[-1:]] * (-len(frames) % depth)])
        patches = stills.reshape(-1, depth, height * width, *stills.shape[2:]).transpose(0, 2, 3, 1, 4)
        return patches.reshape(len(patches) * height * width, -1), [len(patches), height, width]


def spread_marks(text: str, mark: str, counts: Iterator[SupportsInt]) -> str:
    """Every mark as many times as the next count says."""
    first, *rest = text.split(mark)
    return first + "".join(mark * int(next(counts, 1)) + piece for piece in rest)


def video_size_of(folder: Path) -> dict | None:
    """The least and most pixels of a video's frame, where the folder says so."""
    values = {}
    if (folder / "video_preprocessor_config.json").exists():
        values = read_json(folder / "video_preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        values = read_json(folder / "processor_config.json").get("video_processor", {})
    if "size" not in values and "min_pixels" in values and "max_pixels" in values:
        return {"shortest_edge": values["min_pixels"], "longest_edge": values["max_pixels"]}
    return values.get("size")


def chat_template_of(folder: Path) -> str | None:
    """The template that older folders keep in chat_template.json, newer ones in chat_template.jinja."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").exists():
        return read_json(folder / "chat_template.json")["chat_template"]
    return None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by transformers."""
    # Declared as perhaps None, which is never returned.
    return transformers.AutoTokenizer.from_pretrained(folder, **FROM_FOLDER)  # pyrefly: ignore[bad-return]


def load_processor(folder: Path) -> Any:
    """The processor of a folder, by transformers."""
    return transformers.AutoProcessor.from_pretrained(folder, **FROM_FOLDER)


def read_processor(load: Callable[[Path], Any], folder: Path, images: bool) -> Any:
    """The processor of a folder, by the loader of its family, which reads `images` or not.

    Raises FileNotFoundError where a folder has no tokenizer or no image processor, and ValueError, naming file or
    folder, where their files are broken.
    """
    for name in {*TOKENIZER_FILES, *PROCESSOR_FILES, *MORE_FILES}:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    for noun, names in (("tokenizer", TOKENIZER_FILES), ("image processor", PROCESSOR_FILES if images else ())):
        if names and not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(f"{folder} has no {noun}: none of {', '.join(names)}")
    with refusing(f"the processor of {folder} cannot be loaded"):
        processor = load(folder)
    for part in ("tokenizer", "image_processor") if images else ("tokenizer",):
        if not hasattr(processor, part):
            raise ValueError(f"the processor of {folder} is a {type(processor).__name__}, which has no {part}")
    return processor


def check_processor(processor: Any, adapter: PromptAdapter) -> None:
    """Raises ValueError, naming what to change, where a folder's processor writes other image tokens than its
    config.json names, or not as many as an image has features; a blank picture shows it."""
    mark = adapter.image_mark(processor)
    if mark is None:
        return
    tokenizer = processor.tokenizer

    def contradiction(noun: str, token: int, written: int) -> ValueError:
        known = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
        return ValueError(
            f"config.json says that token {token} ({'not in the tokenizer' if known is None else repr(known)}) stands "
            f"for {noun}, the processor writes {written} ({tokenizer.convert_ids_to_tokens(written)!r})"
        )

    if adapter.video_token_id is not None:
        written = tokenizer.convert_tokens_to_ids(adapter.video_mark(processor))
        if written != adapter.video_token_id:
            raise contradiction("videos", adapter.video_token_id, written)
    try:
        inputs = process(processor, mark, images=[Image.new("RGB", (64, 48))])
        ids = np.asarray(inputs["input_ids"][0])
        counts = np.bincount(ids)
        if not adapter.is_image(ids).any() and counts.max(initial=0) > 1:
            raise contradiction("images", adapter.image_token_ids[0], int(counts.argmax()))
        check_prompt(adapter, ids, adapter.lay_out(inputs), tokenizer)
    except ValueError as error:
        image_processor, wrong = getattr(processor, "image_processor", None), []
        for name, value in adapter.processor_settings.items():
            found = getattr(processor, name, getattr(image_processor, name, None))
            if found != value:
                wrong.append(f"{name} must be {value!r}, it is {found!r}")
        raise ValueError(
            f"the folder's processor does not fit its config.json: {'; '.join(wrong) or str(error)}"
        ) from error
