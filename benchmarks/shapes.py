"""Published sizes of targets, heads and trees, and models of these sizes with random weights: what times and bytes need
of a model without its training."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.eagle import EagleConfig
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.layers import TextConfig
from jaxspec.rope import RopeConfig
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import LlavaConfig

Module = TypeVar("Module", bound=nnx.Module)

CLIP = ClipVisionConfig(1024, 4096, 24, 16, 336, 14)
SMALL_CLIP = ClipVisionConfig(32, 64, 2, 2, 28, 14)
SHAPES = {
    "llava-7b": LlavaConfig(TextConfig(32064, 4096, 11008, 32, 32, 32, 128), CLIP, 32000),
    "qwen-7b-text": LlavaConfig(
        TextConfig(152064, 3584, 18944, 28, 28, 4, 128, rope=RopeConfig(1e6), qkv_bias=True), CLIP, 151655
    ),
    "tiny": LlavaConfig(TextConfig(320, 64, 128, 2, 4, 2, 16), SMALL_CLIP, 319),
}
"""config.json of llava-hf/llava-1.5-7b-hf; the text model of Qwen2.5-VL-7B-Instruct behind LLaVA's tower; a toy."""
HEADS = {
    "eagle2": ("eagle2", lambda text: EagleConfig(text, qkv_bias=text.qkv_bias)),
    "vispec": ("vispec", lambda text: ViSpecConfig(text, qkv_bias=text.qkv_bias)),
    "vispec-eighth": (
        "vispec",
        lambda text: ViSpecConfig(text, qkv_bias=text.qkv_bias, draft_vocab_size=text.vocab_size // 8),
    ),
}
"""Name -> method and config of the target's text; "vispec-eighth" drafts an eighth of the vocabulary."""
TREES = {"published": None, "3/8/30": TreeConfig(3, 8, 30), "chain of 5": TreeConfig.chain(5)}
"""Depth, top_k and nodes; None is the method's own."""


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


def random_head(name: str, config: LlavaConfig, dtype: str) -> nnx.Module:
    """The head of `HEADS` with that name, for a target of that config."""
    method, config_of = HEADS[name]
    return random_module(functools.partial(METHODS[method].module, config_of(config.text.plain())), dtype)
