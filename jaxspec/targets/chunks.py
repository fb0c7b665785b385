"""Prompts cut into chunks of a few sizes, on the host: what a target reads at a time, and which images stand in it.

A prompt that fits one chunk is read at once; a longer one takes several. Every row of a batch is cut for itself, so
that rows may begin anywhere (what stands before is in the cache already) and end anywhere.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Generic

import jax
import numpy as np

from jaxspec.buckets import chunk_size
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.images import Array, ImageLayout, table_index
from jaxspec.targets.prompts import EncodedPrompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk(Generic[Array]):
    """The next C tokens of a batch of prompts, right-padded."""

    input_ids: Array  # i32 [B, C], image tokens expanded
    count: Array  # i32 [B], tokens of each row that are real
    image_ids: Array  # i32 [B, C], which image of its prompt a token belongs to, -1 for text
    position_ids: Array | None = None  # i32 [3, B, C] where the family has positions of its own


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk, and where in it the features of which images stand."""

    chunk: Chunk[np.ndarray]
    placements: dict[Hashable, np.ndarray]  # image -> i32 [B, C], which feature of its table each token has, or -1


def cuts(image_ids: np.ndarray, start: int, limit: int, whole_images: bool) -> list[tuple[int, int]]:
    """The pieces (first token, token after the last) of a prompt from token `start` on, of at most `limit` tokens each.
    `image_ids` i32 `[S]` says which image a token belongs to, -1 for text.

    With `whole_images` none ends within an image, and `limit` grows to the longest one.
    """
    length = len(image_ids)
    if whole_images and (image_ids >= 0).any():
        limit = max(limit, int(np.bincount(image_ids[image_ids >= 0]).max()))
    pieces = []
    while start < length:
        stop = min(start + limit, length)
        if whole_images and stop < length and image_ids[stop] >= 0:
            within = np.flatnonzero(image_ids[start:stop] == image_ids[stop])
            stop = start + int(within[0]) if len(within) else stop
        pieces.append((start, stop))
        start = stop
    return pieces


def image_ids_of(adapter: PromptAdapter, prompt: EncodedPrompt) -> np.ndarray:
    """Which image each token of a prompt belongs to, -1 for text: i32 `[S]`."""
    ids = np.full(len(prompt.input_ids), -1, np.int32)
    ids[adapter.is_image(prompt.input_ids)] = np.repeat(
        np.arange(len(prompt.images)), [layout.tokens for layout in prompt.images]
    )
    return ids


def steps_of(
    adapter: PromptAdapter,
    prompts: Sequence[EncodedPrompt],
    limit: int,
    capacity: int,
    starts: Sequence[int] | None = None,
) -> list[Step]:
    """How to read a batch of prompts, from token `starts[row]` of each on (0 by default).

    No chunk has more than `limit` tokens, unless an image that must be read whole has more, and none more than
    `capacity`, the positions of the cache. A batch of short prompts is one chunk of a finely stepped size, all others
    share three sizes. An image's key in `Step.placements` is its layout's `key`.
    """
    starts = starts or [0] * len(prompts)
    places = [image_ids_of(adapter, prompt) for prompt in prompts]
    whole = adapter.config.reads_images_whole
    plans = [cuts(ids, first, limit, whole) for ids, first in zip(places, starts, strict=True)]
    count = max(map(len, plans))
    steps = []
    for number in range(count):
        pieces = [plan[number] if number < len(plan) else (0, 0) for plan in plans]
        longest = max(stop - start for start, stop in pieces)
        size = min(chunk_size(longest, limit, alone=count == 1 and not any(starts)), capacity)
        steps.append(step_of(adapter, prompts, places, pieces, size))
    return steps


def step_of(
    adapter: PromptAdapter,
    prompts: Sequence[EncodedPrompt],
    places: Sequence[np.ndarray],
    pieces: Sequence[tuple[int, int]],
    size: int,
) -> Step:
    """The chunk of `size` tokens that holds one piece of each prompt."""
    shape = (len(prompts), size)
    ids, image_ids = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    positions, placements = None, {}
    if any(prompt.position_ids is not None for prompt in prompts):
        positions = np.zeros((3, *shape), np.int32)
    for row, (prompt, where, (start, stop)) in enumerate(zip(prompts, places, pieces, strict=True)):
        width = stop - start
        ids[row, :width] = prompt.input_ids[start:stop]
        image_ids[row, :width] = where[start:stop]
        if positions is not None:
            own = np.arange(start, stop) if prompt.position_ids is None else prompt.position_ids[:, start:stop]
            positions[:, row, :width] = own
        for number in np.unique(where[start:stop]):
            if number >= 0:
                layout = prompt.images[number]
                index = placements.setdefault(layout.key, np.full(shape, -1, np.int32))
                within = np.flatnonzero(where == number)
                inside = (within >= start) & (within < stop)
                index[row, within[inside] - start] = table_index(layout, adapter.shared_features)[inside]
    count = np.array([stop - start for start, stop in pieces], np.int32)
    return Step(Chunk(ids, count, image_ids, positions), placements)


def position_offset(prompt: EncodedPrompt) -> int:
    """How far the position of the first new token is from the length of the prompt: not 0 where images take fewer
    positions than tokens."""
    return 0 if prompt.position_ids is None else int(prompt.position_ids.max()) + 1 - len(prompt.input_ids)


def images_of(prompts: Sequence[EncodedPrompt]) -> dict[Hashable, ImageLayout]:
    """The different images of a batch by key."""
    return {layout.key: layout for prompt in prompts for layout in prompt.images}
