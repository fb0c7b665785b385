"""A target's pass over whole prompts, in one program with its tower: what training reads of a target.

Decoding reads prompts in chunks instead (jaxspec/speculation/prefill.py)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxspec.cache import LayerKV
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.prompts import PromptBatch


class PromptPass(NamedTuple):
    """What a target makes of a batch of prompts."""

    features: jax.Array  # [B, S, (T + 1) * D], T tapped layers before the final features
    kv: tuple[LayerKV, ...]  # per layer
    embeds: jax.Array  # [B, S, D], image features in place
    vision: jax.Array | None  # [R, Dv], what the tower saw; None without images


def read_prompts(
    model: VisionLanguageModel, prompts: PromptBatch[jax.Array], tap_layers: Sequence[int] = ()
) -> PromptPass:
    """The model over a right-padded batch of prompts, with their answers or without."""
    images = prompts.images
    vision = None if images is None else model.encode_vision(images.pixels)
    embeds = model.embed(prompts.input_ids, images, vision)
    image_ids = None if images is None else images.ids
    features, kv = model.prefill(embeds, prompts.lengths, image_ids, prompts.position_ids, tap_layers)
    return PromptPass(features, kv, embeds, vision)
