"""Weight-only int8: matrices as integers with one float scale for each output channel.

The scale of a channel is its largest weight over 127, and its weights are the integers nearest to weight over scale
(symmetric, no zero points). Products read the integers and scale what comes out, `x @ (q * s) = (x @ q) * s`, so that
the matrix is nowhere kept as floats: half the bytes of bfloat16, in memory and in every step of decoding. Activations,
norms and biases stay as they are, and an int8 is exact in bfloat16.

A module takes part by having `kernel_scale` beside its matrix (`jaxspec.layers.Linear`) or, for a table of embeddings
that is the LM head as well, `embedding_scale`: None, or the scales of a matrix that is int8 then. Loaders quantise
tensor by tensor (`jaxspec.checkpoints.names.fill`); what is in memory already is quantised by `quantized`.
"""

import functools
from collections.abc import Iterator
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.checks import shown

Module = TypeVar("Module")
"""An `nnx.Module`; not a bound, for a protocol such as `DraftModel` cannot say that it is one."""

SCHEMES = ("int8",)
LARGEST = 127
SUFFIX = "_scale"
"""What the name of the scales has behind that of their matrix."""
TARGET_PART = "language_model"
"""Of a target only the text model is quantised, whose weights every step reads: vision tower and projector run once per
image, are bound by arithmetic, and hand their errors to every token."""
INPUT_AXES = {"kernel": 0, "embedding": 1}
"""Where the inputs of a matrix lie, which share a scale. The rows of an embedding are the outputs of the LM head."""


def check_scheme(scheme: str | None, name: str = "quantize") -> None:
    """Raises ValueError for what is no scheme; None is not to quantise."""
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"{name} must be one of {', '.join(SCHEMES)}, or None, got {shown(scheme)}")


def product(x: jax.Array, matrix: jax.Array, scale: nnx.Param | None = None) -> jax.Array:
    """f32 `[.., F]` of features `[.., D]` and a matrix `[D, F]`, or an int8 one with its `scale` f32 of F entries."""
    if scale is None:
        return jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    # Weights do not change in a loop of rounds, but what they are multiplied with does. Without the barrier XLA makes
    # floats of all matrices before the loop (seen on a CPU), and keeps them.
    x, matrix = jax.lax.optimization_barrier((x, matrix))
    return jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32) * scale[...].reshape(-1)


@functools.partial(jax.jit, static_argnames="axis")
def to_int8(weights: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """A matrix whose inputs lie along `axis` as integers i8, and their scales f32, of size 1 along `axis`."""
    weights = weights.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weights), axis=axis, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0)  # channels of zeros
    return jnp.round(weights / scale).astype(jnp.int8), scale


def matrices(module: object, part: str | None = None) -> Iterator[tuple[tuple, nnx.Module, str]]:
    """(path, owner, name) of every matrix that is quantised, or may be; of those below the attribute `part` only, where
    one is named."""
    for path, owner in nnx.iter_modules(cast(nnx.Module, module)):
        if part is None or path[:1] == (part,):
            if hasattr(owner, "kernel_scale"):
                yield (*path, "kernel"), owner, "kernel"
            elif getattr(owner, "unembeds", False):
                yield (*path, "embedding"), owner, "embedding"


def is_quantized(module: object) -> bool:
    """Whether any matrix of a model is int8."""
    return any(getattr(owner, name + SUFFIX) is not None for _, owner, name in matrices(module))


def quantized(module: Module, part: str | None = None) -> Module:
    """A copy of a model with int8 matrices, below the attribute `part` where one is named; all else is shared with the
    original. Serves abstract models, too.

    Raises ValueError for a model that is quantised already.
    """
    if is_quantized(module):
        raise ValueError("the model is quantised already; quantise the one with float weights that it was made from")
    copy = nnx.merge(*nnx.split(module))
    for _, owner, name in list(matrices(copy, part)):
        weights = getattr(owner, name)
        convert = functools.partial(to_int8, axis=INPUT_AXES[name])
        value = weights.get_value()
        integers, scale = jax.eval_shape(convert, value) if isinstance(value, jax.ShapeDtypeStruct) else convert(value)
        setattr(owner, name, nnx.Param(integers))
        setattr(owner, name + SUFFIX, nnx.Param(scale))
    return copy
