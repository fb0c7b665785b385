"""Models of published sizes with random weights, drawn where they are used: what times need of a model without its
training."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.published import HEADS
from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.registry import METHODS

Module = TypeVar("Module", bound=nnx.Module)


def random_module(build: Callable[..., Module], dtype: str) -> Module:
    """The module that `build(rngs=)` makes, drawn on the device in `dtype`: matrices at fan-in scale, embeddings of
    entries near 1, norms of 1, biases of 0; integers count up."""
    graph, state = nnx.split(abstract(lambda rngs: build(rngs=rngs)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def filled(path: tuple, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)][-1]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(name == "scale"), dtype)
        return normal(key, leaf.shape, dtype, 1.0 if name == "embedding" else leaf.shape[0] ** -0.5)

    drawn = [filled(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    """A program for each shape, of which a model has few."""
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def random_head(name: str, target: Any, dtype: str) -> nnx.Module:
    """The head of `HEADS` with that name, for a target of that config."""
    method, config_of = HEADS[name]
    return random_module(functools.partial(METHODS[method].module, config_of(target)), dtype)
