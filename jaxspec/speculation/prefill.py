"""Reading prompts before decoding, in programs that add up instead of multiplying.

    table  = encode_image(model, draft_model, pixels)  # one per shape of the tower; kept for an image seen again
    images = place(no_images(..), table, index)        # features of images at the tokens of a chunk
    read   = read_chunk(model, draft_model, read, chunk, images)  # until the prompts are in the cache
    state  = loop.begin(model, draft_model, read, request, ..)    # the drafter's prefill and the first token

A prompt may be read in any number of chunks; what stands in `Read` of an earlier prompt that begins alike is gone on
from (`rewind`). The drafter is given the whole prompt, so that a method which needs all of it has it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.buckets import power_of_two, table_bucket
from jaxspec.cache import Cache, write_at
from jaxspec.drafters.contract import DrafterContext, DraftModel
from jaxspec.splitting import kv_copies
from jaxspec.targets.chunks import Chunk
from jaxspec.targets.contract import VisionLanguageModel


class ImageFeatures(NamedTuple):
    """Features of images: a table with one for each place of the tower, or one for each token of a chunk."""

    features: jax.Array  # [R, D] or [B, C, D], in the text model's width
    vision: jax.Array | None  # [R, Dv] or [B, C, Dv], before the projector; None where no drafter reads them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftInputs:
    """What a drafter reads of prompts of up to S tokens."""

    embeds: jax.Array  # [B, S, D], image features in place
    features: jax.Array  # [B, S, (T + 1) * D], as `VisionLanguageModel.prefill` gives them
    vision: jax.Array | None  # [B, S, Dv], what the tower saw at each token
    input_ids: jax.Array  # i32 [B, S]
    image_ids: jax.Array  # i32 [B, S], -1 for text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """Prompts as far as they have been read. Every leaf leads with the batch."""

    cache: Cache
    last: jax.Array  # [B, (T + 1) * D], features of the last token read
    inputs: DraftInputs | None  # None without a drafter


def taps_of(draft_model: DraftModel | None) -> tuple[int, ...]:
    """The layers of the target whose outputs a drafter reads beside the final features."""
    return getattr(draft_model, "tap_layers", ())


def reads_vision(draft_model: DraftModel | None) -> bool:
    """Whether a drafter reads what the tower saw before the target's projector."""
    return getattr(draft_model, "reads_vision", False)


def encode_image(model: VisionLanguageModel, draft_model: DraftModel | None, pixels: Any) -> ImageFeatures:
    """The table of one image (or of several, collated): `pixels` as `PromptAdapter.collate` makes them. R is padded to
    one of a few sizes, so that tables of all shapes share the programs behind them."""
    vision = model.encode_vision(pixels)
    with jax.named_scope("projector"):
        features = model.project(vision)

    def padded(x):
        return jnp.pad(x, ((0, table_bucket(x.shape[0]) - x.shape[0]), (0, 0)))

    return ImageFeatures(padded(features), padded(vision) if reads_vision(draft_model) else None)


def no_images(model: VisionLanguageModel, draft_model: DraftModel | None, batch: int, length: int) -> ImageFeatures:
    """Zeros `[B, C, ..]`: a chunk of C = `length` tokens before its images are placed."""

    def zeros(width):
        return jnp.zeros((batch, length, width), model.dtype)

    vision = zeros(model.config.vision_width) if reads_vision(draft_model) else None
    return ImageFeatures(zeros(model.config.text.hidden_size), vision)


def place(images: ImageFeatures, table: ImageFeatures, index: jax.Array) -> ImageFeatures:
    """`images` `[B, C, ..]` with the features `index` i32 `[B, C]` of a table in place; those at -1 stay."""
    here = (index >= 0)[..., None]
    return jax.tree.map(lambda old, new: jnp.where(here, new[jnp.maximum(index, 0)], old), images, table)


def nothing_read(model: VisionLanguageModel, draft_model: DraftModel | None, batch: int, capacity: int) -> Read:
    """Prompts of which nothing is read yet, with room for `capacity` tokens in each row."""
    text, dtype = model.config.text, model.dtype
    width = text.hidden_size * (len(taps_of(draft_model)) + 1)
    inputs = None
    if draft_model is not None:
        images = no_images(model, draft_model, batch, capacity)
        inputs = DraftInputs(
            embeds=images.features,
            features=jnp.zeros((batch, capacity, width), dtype),
            vision=images.vision,
            input_ids=jnp.zeros((batch, capacity), jnp.int32),
            image_ids=jnp.full((batch, capacity), -1, jnp.int32),
        )
    heads = text.num_kv_heads * kv_copies(text.num_heads, text.num_kv_heads)
    cache = Cache.empty(text.num_layers, batch, heads, capacity, text.head_dim, dtype)
    return Read(cache, jnp.zeros((batch, width), dtype), inputs)


def read_chunk(
    model: VisionLanguageModel,
    draft_model: DraftModel | None,
    read: Read | None,
    chunk: Chunk[jax.Array],
    images: ImageFeatures | None,
) -> Read:
    """The prompts read on by a chunk of C tokens; without `read` it is the whole of them so far, and the result has
    room for C tokens, rounded up to a power of two.

    `images` are the features at the tokens of images, `[B, C, ..]` or longer; None for a target that reads none.
    """
    length = chunk.input_ids.shape[1]
    images = None if images is None else jax.tree.map(lambda x: x[:, :length], images)
    embeds = model.splice(chunk.input_ids, None if images is None else images.features, chunk.image_ids)
    with jax.named_scope("prefill"):
        before = None if read is None else read.cache
        features, new_kv = model.prefill(
            embeds, chunk.count, chunk.image_ids, chunk.position_ids, taps_of(draft_model), before
        )
    at = jnp.maximum(chunk.count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(features, at, axis=1)[:, 0]
    inputs = None
    if draft_model is not None:
        vision = None if images is None else images.vision
        inputs = DraftInputs(embeds, features, vision, chunk.input_ids, chunk.image_ids)
    if read is None:
        return with_room(Read(Cache(new_kv, chunk.count), last, inputs), max(64, power_of_two(length)))
    if draft_model is not None:
        inputs = jax.tree.map(lambda old, new: write_at(old, new, read.cache.lengths, chunk.count), read.inputs, inputs)
    last = jnp.where((chunk.count > 0)[:, None], last, read.last)
    return Read(read.cache.append(new_kv, chunk.count), last, inputs)


def context_of(read: Read, seeds: jax.Array, root: jax.Array, max_images: int) -> DrafterContext:
    """What a drafter sees of prompts that have been read; `seeds` u32 and `root` i32 `[B]`."""
    inputs, lengths = read.inputs, read.cache.lengths
    assert inputs is not None  # kept wherever there is a drafter
    vision = index = None
    if inputs.vision is not None:
        vision = inputs.vision.reshape(-1, inputs.vision.shape[-1])
        index = jnp.arange(vision.shape[0]).reshape(inputs.image_ids.shape)
    # Behind the prompt there may be what an earlier one left.
    image_ids = jnp.where(jnp.arange(inputs.image_ids.shape[1]) < lengths[:, None], inputs.image_ids, -1)
    return DrafterContext(
        embeds=inputs.embeds,
        features=inputs.features,
        vision=vision,
        vision_index=index,
        image_ids=image_ids,
        input_ids=inputs.input_ids,
        lengths=lengths,
        prompt_lengths=lengths,
        seeds=seeds,
        root=root,
        max_images=max_images,
    )


def with_room(read: Read, capacity: int) -> Read:
    """The same with room for `capacity` tokens in each row: longer, to be read on, or cut where it had more than
    needed."""

    def resized(x: jax.Array, axis: int) -> jax.Array:
        x = jax.lax.slice_in_dim(x, 0, min(capacity, x.shape[axis]), axis=axis)
        return jnp.pad(x, [(0, capacity - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])

    layers = jax.tree.map(lambda x: resized(x, 2), read.cache.layers)
    inputs = jax.tree.map(lambda x: resized(x, 1), read.inputs)
    return dataclasses.replace(read, cache=Cache(layers, read.cache.lengths), inputs=inputs)


def rewind(read: Read, lengths: jax.Array) -> Read:
    """The first `lengths` i32 `[B]` tokens of prompts that have been read, to go on from with other ones. At least one
    more token must be read before decoding begins. With bidirectional images none may be cut."""
    return dataclasses.replace(read, cache=dataclasses.replace(read.cache, lengths=lengths))
