"""Where the features of images stand in a batch of prompts.

A family's tower turns pixels into a table of features; an index says which of them stands at each token. The index is
made on the host, from sizes, so that any number of images of any size lands in the same few compiled shapes.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from jaxspec.buckets import power_of_two

Array = TypeVar("Array", jax.Array, np.ndarray)
"""What a batch is made of: numpy's arrays on the host, JAX's in a program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images(Generic[Array]):
    """The images of a batch, as the device sees them."""

    pixels: Any  # what the family's tower reads, in bucketed shapes
    index: Array  # i32 [B, S], which feature of the table stands at each image token, 0 at text
    ids: Array  # i32 [B, S], which image of its prompt a token belongs to, -1 for text


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """One image (or video) on the host."""

    pixels: Any  # arrays that the tower reads
    index: np.ndarray  # i32 [K], which feature of its own part of the table each token has; -1 - i is shared feature i
    table_size: int  # features that it adds to the table

    @property
    def tokens(self) -> int:
        return len(self.index)

    @functools.cached_property
    def key(self) -> str:
        """Names what the tower reads: equal for equal pixels in equal shapes, and then the table is the same."""
        digest = hashlib.blake2b(digest_size=16)
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.pixels):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
            digest.update(array.data)
        return digest.hexdigest()


def table_index(layout: ImageLayout, start: int) -> np.ndarray:
    """Which feature of a table in which the image's own begin at `start` each of its tokens has: i32 `[K]`."""
    return np.where(layout.index < 0, -1 - layout.index, start + layout.index).astype(np.int32)


def image_runs(input_ids: np.ndarray, is_image: np.ndarray) -> list[tuple[int, int]]:
    """(id, length) of the runs of one image token in ids `[S]`; images that touch are in one run."""
    places = np.flatnonzero(is_image)
    if not len(places):
        return []
    kinds = input_ids[places]
    borders = np.flatnonzero((np.diff(places) > 1) | (np.diff(kinds) != 0)) + 1
    return [(int(run[0]), len(run)) for run in np.split(kinds, borders)]


def check_images(input_ids: np.ndarray, is_image: np.ndarray, layouts: Sequence[ImageLayout]) -> None:
    """Raises ValueError where one prompt `[S]` has not as many tokens for each image as the image has features."""
    marks, features = int(is_image.sum()), sum(layout.tokens for layout in layouts)
    sentence = f"the prompt has {marks} image tokens, its images have {features} features"
    runs = [length for _, length in image_runs(input_ids, is_image)]
    number = 0
    for left in runs:
        while left > 0 and number < len(layouts):
            left -= layouts[number].tokens
            number += 1
        if left:
            break
    else:
        if number == len(layouts):
            return
    if len(runs) == len(layouts):  # text stands between the images: it is plain which of them is meant
        pairs = enumerate(zip(runs, layouts, strict=True), 1)
        sentence += next(
            f"; image {index} has {length} tokens for {layout.tokens} features"
            for index, (length, layout) in pairs
            if length != layout.tokens
        )
    raise ValueError(sentence)


def check_pixels(pixels: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The pixels `[.., *shape]`. Raises ValueError where the tower reads another shape than the processor makes."""
    if pixels.shape[-len(shape) :] != shape:
        made = pixels.shape[-len(shape) :]
        raise ValueError(f"the processor makes {name} of shape {made}, the vision tower reads {shape}")
    return pixels


def single_entries(pixels: Iterable[Any], shape: tuple[int, ...], tokens: int) -> list[ImageLayout]:
    """Images of which each is one entry of the tower, of `shape`, and has `tokens` tokens."""
    images = (check_pixels(np.asarray(image, np.float32), shape, "images") for image in pixels)
    return [ImageLayout(image[None], np.arange(tokens), tokens) for image in images]


def stack_entries(layouts: Sequence[ImageLayout]) -> np.ndarray:
    """Pixels f32 `[T, ..]` of all images after one another, T padded with zeros to a power of two."""
    entries = np.concatenate([layout.pixels for layout in layouts])
    spare = power_of_two(len(entries)) - len(entries)
    return np.concatenate([entries, np.zeros((spare, *entries.shape[1:]), entries.dtype)])


def split_by_tokens(layouts: Sequence[ImageLayout], tokens: Sequence[int]) -> list[list[ImageLayout]]:
    """The images of each prompt, by how many image tokens it has. Raises ValueError for images that no prompt shows."""
    rest, split = list(layouts), []
    for count in tokens:
        own = []
        while rest and sum(layout.tokens for layout in own) < count:
            own.append(rest.pop(0))
        split.append(own)
    if rest:
        shown = len(layouts) - len(rest)
        raise ValueError(f"the prompts have image tokens for {shown} images, {len(layouts)} were given")
    return split


def stack_positions(positions: Sequence[np.ndarray | None], length: int) -> np.ndarray | None:
    """Positions i32 `[3, B, length]` of prompts i32 `[3, S]` each (or 0, 1, 2, .. where None), None if all are None."""
    if all(each is None for each in positions):
        return None
    stacked = np.broadcast_to(np.arange(length, dtype=np.int32), (3, len(positions), length)).copy()
    for row, each in enumerate(positions):
        if each is not None:
            stacked[:, row, : each.shape[1]] = each
    return stacked
