"""What a request may be made of: every argument that cannot be meant is one sentence, before anything is compiled."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxspec.checks import shown, whole_number
from jaxspec.media import ImageLike
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.prompts import check_prompt as check_readable
from jaxspec.video import Video

DEFAULT_MAX_LENGTH = 4096


def length_limit(max_length: Any, positions: int) -> int:
    """Most tokens of prompt and answer together, for a target of so many positions."""
    if max_length is None:
        return min(positions, DEFAULT_MAX_LENGTH)
    length = whole_number("max_length", max_length, 2)
    if length > positions:
        raise ValueError(f"max_length must be at most {positions}, the positions of the target; got {length}")
    return length


def is_list(value: Any) -> bool:
    """Whether a value holds one entry per request, rather than being one itself."""
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes | bytearray)
    return several and getattr(value, "ndim", 1) > 0


def one_each(name: str, values: Sequence, count: int) -> list:
    """As many `values` as there are prompts."""
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
    return list(values)


def prompt_list(prompts: Any) -> list:
    """The prompts of a batch."""
    if isinstance(prompts, str):
        raise ValueError("generate_batch needs a list of prompts, got one string; generate takes a single prompt")
    if not is_list(prompts):
        raise ValueError(f"generate_batch needs a list of prompts, got {type(prompts).__name__}")
    return list(prompts)


def check_prompt(prompt: Any, name: str) -> None:
    """Raises ValueError for what is neither a string nor a list of messages; what is in these is not looked at."""
    if not isinstance(prompt, str | list | tuple):
        raise ValueError(f"{name} must be a string or a list of chat messages, got {type(prompt).__name__}")


def check_encoded(prompt: Any, name: str, adapter: PromptAdapter) -> None:
    """Raises ValueError for what `jaxspec.prompting.encode_prompt` has not made, or not for this target."""
    if not isinstance(prompt, EncodedPrompt):
        raise ValueError(f"{name} must be an EncodedPrompt, from encode_prompt; got {type(prompt).__name__}")
    check_readable(adapter, prompt.input_ids, prompt.images)


def image_lists(images: Any, count: int) -> list[list[ImageLike]]:
    """The images of every prompt of a batch; None, for all or for one, is no image."""
    if images is None:
        return [[] for _ in range(count)]
    if not is_list(images):
        raise ValueError(f"images must be a list with a list of images per prompt, got {what(images)}")
    entries = one_each("images", images, count)
    return [image_list(each, f"images of prompt {index}") for index, each in enumerate(entries)]


def image_list(images: Any, name: str = "images") -> list[ImageLike]:
    """The images of one prompt. An array is several images only where it has a dimension more than one image."""
    if images is None:
        return []
    single = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image | Video | Mapping)
    if single or getattr(images, "ndim", 4) < 4 or not hasattr(images, "__iter__"):
        raise ValueError(f"{name} must be a list of images, got {what(images)}; a single image is given as [image]")
    return list(images)


def what(images: Any) -> str:
    """How a sentence names what was given in place of a list of images."""
    if isinstance(images, str | os.PathLike):
        return f"one path, {str(images)[:60]!r}"
    if isinstance(images, Image.Image):
        return "one picture"
    if hasattr(images, "ndim"):
        return f"one array of shape {tuple(images.shape)}"
    return type(images).__name__


def sampling_list(sampling: Any, count: int) -> list[SamplingParams]:
    """How every prompt is sampled; one for all may be given."""
    entries = one_each("sampling", sampling, count) if is_list(sampling) else [sampling] * count
    for each in entries:
        if not isinstance(each, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, got {type(each).__name__}: {shown(each)}")
    return entries


def check_sampling(params: SamplingParams, limit: int, vocab_size: int) -> None:
    """Raises ValueError for biased tokens that a target of so many does not have, and for more tokens at least than at
    most."""
    for token in dict(params.logit_bias):
        if token >= vocab_size:
            raise ValueError(f"logit_bias has token {token}, the target has only {vocab_size} tokens")
    if params.min_tokens > limit:
        raise ValueError(f"min_tokens must be at most max_new_tokens ({limit}), got {params.min_tokens}")


def limit_list(max_new_tokens: Any, count: int) -> list[int]:
    """The token limit of every prompt; one for all may be given."""
    entries = one_each("max_new_tokens", max_new_tokens, count) if is_list(max_new_tokens) else [max_new_tokens] * count
    return [whole_number("max_new_tokens", each, 1) for each in entries]
