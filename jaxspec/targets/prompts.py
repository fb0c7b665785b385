"""Prompts as arrays: one on the host, and a batch of them as a target's prefill reads it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic

import jax
import numpy as np

from jaxspec.buckets import bucket_below
from jaxspec.checks import shown
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.images import Array, ImageLayout, Images, check_images, split_by_tokens, stack_positions


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One prompt (in training: with its answers) on the host."""

    input_ids: np.ndarray  # i32 [S], image marks expanded to image tokens
    images: list[ImageLayout]
    position_ids: np.ndarray | None = None  # i32 [3, S] where the family has positions of its own

    @classmethod
    def of(
        cls, adapter: PromptAdapter, input_ids: np.ndarray, images: list[ImageLayout], tokenizer: Any = None
    ) -> "EncodedPrompt":
        """A prompt that the target can read, with its positions. Raises ValueError as `check_prompt`."""
        check_prompt(adapter, np.asarray(input_ids), images, tokenizer)
        ids = np.asarray(input_ids, np.int32)
        return cls(ids, images, adapter.position_ids(ids, images))


def prompts_of(adapter: PromptAdapter, inputs: Mapping[str, Any], tokenizer: Any = None) -> list[EncodedPrompt]:
    """The prompts of a processor's outputs: `input_ids` `[B, S]`, perhaps `attention_mask` `[B, S]` (padding on either
    side is left out) and image arrays. Raises ValueError as `check_prompt`, and for images that no prompt shows."""
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
    rows = [row[real] for row, real in zip(ids, mask, strict=True)]
    images = adapter.lay_out({**inputs, "input_ids": np.concatenate(rows)})
    per_row = split_by_tokens(images, [int(adapter.is_image(row).sum()) for row in rows])
    return [EncodedPrompt.of(adapter, row, own, tokenizer) for row, own in zip(rows, per_row, strict=True)]


def check_tokens(input_ids: Any) -> None:
    """Raises ValueError for what is no integer array `[S]`."""
    flat = isinstance(input_ids, np.ndarray) and input_ids.ndim == 1
    if not flat or (len(input_ids) and input_ids.dtype.kind not in "iu"):
        raise ValueError(f"the tokens of a prompt must be an integer array [S], got {shown(input_ids)}")


def check_prompt(
    adapter: PromptAdapter, input_ids: np.ndarray, images: Sequence[ImageLayout], tokenizer: Any = None
) -> None:
    """Raises ValueError for a prompt without tokens, a token that the embedding has no row for, and an image with
    another number of tokens than features. A `tokenizer` spells the token."""
    check_tokens(input_ids)
    if not len(input_ids):
        raise ValueError("a prompt needs at least one token, it has none")
    rows, is_image = adapter.config.text.vocab_size, adapter.is_image(input_ids)
    outside = input_ids[((input_ids < 0) | (input_ids >= rows)) & ~is_image]  # image tokens take their rows elsewhere
    if len(outside):
        token = int(outside[0])
        known = tokenizer is not None and 0 <= token < len(tokenizer)
        spelt = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if known else ""
        raise ValueError(f"the prompt has token {token}{spelt}, the target's embedding has only {rows} rows")
    check_images(input_ids, is_image, images)


def static(default: int) -> Any:
    """A dataclass field that is part of the compiled program, not of its arguments."""
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch(Generic[Array]):
    """A right-padded batch of prompts."""

    input_ids: Array  # i32 [B, S], image tokens expanded
    lengths: Array  # i32 [B]
    images: Images[Array] | None = None  # those of all rows
    position_ids: Array | None = None  # i32 [3, B, S] where the family has positions of its own
    max_images: int = static(0)  # images of the row that has most
    min_image_tokens: int = static(0)  # image tokens of the row that has fewest, rounded down

    @property
    def image_ids(self) -> Any:
        """Which image of its row a token belongs to, -1 for text: i32 `[B, S]`."""
        return -np.ones(self.input_ids.shape, np.int32) if self.images is None else self.images.ids


def stack_prompts(
    adapter: PromptAdapter, prompts: Sequence[EncodedPrompt], length: int, pad_token_id: int = 0
) -> PromptBatch[np.ndarray]:
    """Prompts of up to `length` tokens as a batch, on the host. Raises ValueError as `check_prompt`."""
    for prompt in prompts:
        check_prompt(adapter, prompt.input_ids, prompt.images)
    ids = np.full((len(prompts), length), pad_token_id, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.input_ids)] = prompt.input_ids
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], np.int32)
    fewest = min(sum(layout.tokens for layout in prompt.images) for prompt in prompts)
    used = np.where(np.arange(length) < lengths[:, None], ids, -1)  # whatever the padding is, it is no image
    return PromptBatch(
        input_ids=ids,
        lengths=lengths,
        images=adapter.place([layout for prompt in prompts for layout in prompt.images], used),
        position_ids=stack_positions([prompt.position_ids for prompt in prompts], length),
        max_images=max(len(prompt.images) for prompt in prompts),
        min_image_tokens=bucket_below(fewest),  # rounded, so that images of all sizes share a few programs
    )
