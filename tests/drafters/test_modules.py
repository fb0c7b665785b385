"""Parts of drafters serve alone: each is built and run from an import of its own, for somebody who needs just it."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


def test_a_vision_adaptor():
    from jaxspec.drafters.vispec import VisionAdaptor

    adaptor = VisionAdaptor(width=16, num_heads=2, num_queries=3, rngs=nnx.Rngs(0))
    embeds = jax.random.normal(jax.random.key(0), (2, 9, 16))
    vectors = adaptor(embeds)

    assert vectors.shape == (2, 1, 3, 16)
    masks = np.zeros((2, 2, 9), bool)
    masks[:, 0, :4] = masks[:, 1, 4:] = True
    parts = adaptor(embeds, jnp.asarray(masks))
    for image, own in enumerate((embeds[:, :4], embeds[:, 4:])):  # the others are not seen
        np.testing.assert_allclose(parts[:, image], adaptor(own)[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"width \(16\) must be a multiple of num_heads \(3\)"):
        VisionAdaptor(16, 3, 1, rngs=nnx.Rngs(0))


def test_a_visual_compressor():
    from jaxspec.drafters.compressor import CompressorConfig, ImageSpans, VisualCompressor

    compressor = VisualCompressor(16, 2, CompressorConfig("pooling", pooling_ratio=2), rngs=nnx.Rngs(0))
    spans = ImageSpans.of(jnp.array([[-1, 0, 0, 0, -1, 1]]), images=2)
    embeds, features = jax.random.normal(jax.random.key(0), (2, 1, 6, 16))
    groups = compressor(spans, embeds, features)

    assert groups.positions[groups.valid].tolist() == [2, 3, 5]
    means = jnp.stack([embeds[0, 1:3].mean(0), embeds[0, 3], embeds[0, 5]])
    np.testing.assert_allclose(groups.embeds[groups.valid], means, atol=1e-6)
    compressor = VisualCompressor(16, 2, rngs=nnx.Rngs(0))
    assert compressor(spans, embeds, features, question=features[:, -1]).embeds.shape[-1] == 16
    with pytest.raises(ValueError, match="compressor mode 'select' needs a question"):
        compressor(spans, embeds, features)


def test_a_context():
    from jaxspec.drafters.contract import DrafterContext

    context = DrafterContext.of(jnp.ones((2, 5, 16)), jnp.ones((2, 5, 32)), image_ids=[[0, 0, -1, 1, -1], [-1] * 5])

    assert context.max_images == 2 and context.vision is None
    assert context.lengths.tolist() == context.prompt_lengths.tolist() == [5, 5]
    assert (context.embeds.shape, context.features.shape) == ((2, 5, 16), (2, 5, 32))
    tokens = DrafterContext.of(input_ids=[[1, 2, 3]], lengths=[2], root=[4])
    assert (tokens.max_images, tokens.embeds.shape, tokens.root.tolist()) == (0, (1, 3, 0), [4])
    made = jax.jit(lambda ids: DrafterContext.of(input_ids=ids, image_ids=ids, max_images=3))(jnp.zeros((1, 3), int))
    assert made.max_images == 3
    with pytest.raises(ValueError, match=r"features are of \[B, S\] \[2, 4\], embeds of \[2, 5\]"):
        DrafterContext.of(jnp.ones((2, 5, 16)), jnp.ones((2, 4, 16)))
    with pytest.raises(ValueError, match="a DrafterContext needs embeds, features or input_ids"):
        DrafterContext.of(lengths=[3])


@pytest.mark.parametrize("module", ["compressor", "contract", "vispec"])
def test_examples_of_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"jaxspec.drafters.{module}"))
    assert results.attempted and not results.failed
