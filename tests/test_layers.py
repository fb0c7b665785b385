"""What layers differ by: kinds, norms, ropes, and what is added to their outputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from jaxspec.drafters.eagle import EagleConfig
from jaxspec.kernels.masks import Mask
from jaxspec.layers import LanguageModel, LayerKind, TextConfig
from jaxspec.rope import RopeConfig, rope_tables
from tests.helpers import randomized

TEXT = TextConfig(50, 16, 24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.mark.parametrize("section", [(4, 2, 2), (2, 3, 3), (8, 0, 0), (24, 20, 20)])
def test_interleaved_multimodal_rope_equals_transformers(section):
    half = sum(section)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), "mrope_interleaved": True}
    config = transformers.Qwen3VLTextConfig(
        hidden_size=2 * half, num_attention_heads=1, num_key_value_heads=1, head_dim=2 * half, rope_parameters=rope
    )
    positions = np.random.default_rng(0).integers(0, 300, (3, 2, 7))
    expected = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    ours = rope_tables(RopeConfig(1e4, mrope_section=section, mrope_interleaved=True), 2 * half, jnp.asarray(positions))
    for table, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(table, theirs[..., :half].numpy(), atol=2e-5)


def run(config: TextConfig, additions=None, tap_layers=()):
    model = randomized(LanguageModel(config, rngs=nnx.Rngs(0)), 1, 1.0)
    embeds = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, config.hidden_size)), jnp.float32)
    return model(embeds, jnp.arange(6)[None], Mask(causal=True), tap_layers=tap_layers, additions=additions)[0]


def test_additions_go_to_the_outputs_of_their_layers():
    rng = np.random.default_rng(0)
    added = {index: jnp.asarray(rng.normal(size=(1, 6, 16)), jnp.float32) for index in (0, 1)}
    states, plain = (np.split(run(TEXT, each, (1, 2)), 3, axis=-1) for each in (added, None))
    np.testing.assert_allclose(states[0], plain[0] + added[0], rtol=1e-5, atol=1e-5)
    alone = np.split(run(TEXT, {0: added[0]}, (1, 2)), 3, axis=-1)
    np.testing.assert_allclose(states[1], alone[1] + added[1], rtol=1e-5, atol=1e-5)
    assert np.abs(states[2] - alone[2]).max() > 0.1


def test_windows_count_places():
    """A window of one is what a token says alone, at its own place; equal kinds are no kinds."""
    kinds = (LayerKind(TEXT.rope),) * 3
    np.testing.assert_array_equal(run(dataclasses.replace(TEXT, layer_kinds=kinds)), run(TEXT))
    narrow = dataclasses.replace(TEXT, layer_kinds=(LayerKind(TEXT.rope, 1),) * 3)
    np.testing.assert_allclose(run(narrow)[:, :1], run(TEXT)[:, :1], rtol=1e-5, atol=1e-5)
    assert np.abs(run(narrow)[:, 1:] - run(TEXT)[:, 1:]).max(axis=-1).min() > 1e-3


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="2 layer_kinds are given for 3 layers"):
        dataclasses.replace(TEXT, layer_kinds=(LayerKind(TEXT.rope),) * 2)
    with pytest.raises(ValueError, match="a layer with a window cannot have multimodal rope"):
        dataclasses.replace(TEXT, layer_kinds=(LayerKind(RopeConfig(mrope_section=(2, 1, 1)), 4),) * 3)


def test_draft_heads_have_llama_layers_whatever_the_target_has():
    head = EagleConfig(dataclasses.replace(TEXT, qk_norm=True, activation="gelu_tanh", num_layers=1))
    assert head.text == dataclasses.replace(TEXT, num_layers=1)
