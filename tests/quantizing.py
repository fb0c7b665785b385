"""The float model that an int8 one stands for, and small targets with and without a head of their own."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec import Target
from jaxspec.quantization import SUFFIX, TARGET_PART, matrices, quantized
from tests.families import family_target


def dequantized(module):
    """The model with every int8 matrix multiplied out, as an ordinary float one."""
    copy = nnx.merge(*nnx.split(module))
    for _, owner, name in list(matrices(copy)):
        scale = getattr(owner, name + SUFFIX)
        if scale is not None:
            setattr(owner, name, nnx.Param(getattr(owner, name)[...].astype(jnp.float32) * scale[...]))
            setattr(owner, name + SUFFIX, None)
    return copy


def as_int8(target: Target) -> Target:
    """The target as `load_target(.., quantize="int8")` gives it, made in memory."""
    model = quantized(target.model, TARGET_PART)
    return Target(
        model, target.adapter, target.processor, target.path, target.stop_token_ids, target.generation_defaults, "int8"
    )


def relative_error(ours, theirs) -> float:
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@functools.cache
def tied_target() -> Target:
    """A Gemma3 text model whose embedding is its LM head."""
    target = family_target("gemma3_text", tie_word_embeddings=True)
    assert target.model.language_model.lm_head is None
    return target
