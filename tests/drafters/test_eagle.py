"""What our EAGLE heads can do beyond the published ones: read several layers of the target, draft part of its
vocabulary."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.drafters.vocabulary import DraftHead, most_frequent, take_from_target
from jaxspec.kernels.masks import Mask
from jaxspec.prompting import encode_prompt
from jaxspec.rope import rope_tables
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.tree import grow_tree
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.reading import read_prompts
from tests.drafting import NARROW, TREE, linked_head
from tests.helpers import GivenNoise


def rounds(target, head, requests, temperature: float) -> list[list[int]]:
    """How many tokens each round of each request emitted."""
    generator = Generator(target, Drafter(head, TREE, "eagle2", {}), max_length=512)
    prompts, images = zip(*requests, strict=True)
    sampling = [SamplingParams(temperature, seed=row) for row in range(len(prompts))]
    results = generator.generate_batch(list(prompts), list(images), sampling, 24)
    assert any(result.accepted.any() for result in results)
    return [result.stats.emitted for result in results]


def test_tapped_layers_stand_before_the_features(target, pictures):
    encoded = encode_prompt(target, "What is this?", pictures[:1])
    prompt = stack_prompts(target.adapter, [encoded], len(encoded.input_ids))
    features, _, embeds, _ = read_prompts(target.model, prompt, (0, 2, 1))
    width, language = target.config.text.hidden_size, target.model.language_model
    rope = rope_tables(language.config.rope, language.config.head_dim, jnp.arange(prompt.input_ids.shape[1])[None])
    first, _ = language.layers[0](embeds, rope, Mask(causal=True))
    second, _ = language.layers[1](first, rope, Mask(causal=True))
    expected = jnp.concatenate([embeds, second, first, language.norm(second)], axis=-1)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert features.shape[-1] == 4 * width


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_that_ignores_its_taps_drafts_as_one_without(target, requests, temperature):
    plain = linked_head(target, "eagle2")
    tapped = EagleHead(dataclasses.replace(plain.config, tap_layers=(0, 1)), rngs=nnx.Rngs(0))  # its taps start at 0
    nnx.update(tapped, nnx.state(plain))
    assert rounds(target, tapped, requests, temperature) == rounds(target, plain, requests, temperature)
    tapped.tap_fc.kernel[...] += 0.3 * jnp.eye(*tapped.tap_fc.kernel.shape)
    assert rounds(target, tapped, requests, temperature) != rounds(target, plain, requests, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_vocabulary_of_all_tokens_changes_no_draft(target, requests, temperature):
    plain, vocabulary = linked_head(target, "eagle2"), target.config.text.vocab_size
    ours = EagleHead(dataclasses.replace(plain.config, draft_vocab_size=vocabulary), rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(plain))
    take_from_target(ours.draft_head, target.model, np.random.default_rng(0).permutation(vocabulary).astype(np.int32))
    assert rounds(target, ours, requests, temperature) == rounds(target, plain, requests, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_over_some_tokens_is_that_over_all_with_the_others_ruled_out(temperature):
    rng = np.random.default_rng(1)
    vocabulary, ids, tree = 40, np.array([3, 39, 4, 11, 12, 30, 7], np.int32), TreeConfig(2, 3, 12)
    logits = rng.normal(size=(3, 3, vocabulary)).astype(np.float32)
    noise = jnp.asarray(rng.gumbel(size=(1, tree.max_depth + 1, vocabulary)), jnp.float32)
    ruled_out = np.full_like(logits, -np.inf)
    ruled_out[..., ids] = logits[..., ids]
    sampling = BatchSampling.from_params([SamplingParams(temperature, seed=0)])

    def grown(logits, ids):
        def expand(carry, tokens, parent, level):
            return carry, jnp.asarray(logits[level][None])

        return grow_tree(
            tree, jnp.zeros(1, jnp.int32), jnp.asarray(logits[2][:1]), GivenNoise(noise), sampling, expand, (), ids
        )

    some, all_tokens = grown(logits[..., ids], jnp.asarray(ids)), grown(ruled_out, None)
    for ours, theirs in zip(some, all_tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert set(np.asarray(some.tokens)[0, 1:].tolist()) <= set(ids.tolist())


def test_the_head_of_a_draft_vocabulary_starts_as_the_targets(target):
    head = linked_head(target, "narrow").draft_head
    features = np.random.default_rng(0).normal(size=(5, target.config.text.hidden_size)).astype(np.float32)
    np.testing.assert_allclose(head(features), target.model.unembed(features)[:, NARROW], rtol=1e-5, atol=1e-5)


def test_the_most_frequent_tokens():
    answers = [np.array([5, 5, 9, 2]), np.array([5, 9, 1], np.int32)]
    assert most_frequent(answers, 12, 3).tolist() == [1, 5, 9]
    assert most_frequent(answers, 12, 2).tolist() == [5, 9]
    with pytest.raises(ValueError, match=r"draft_vocab_size \(13\) is larger than the target's vocabulary \(12\)"):
        most_frequent(answers, 12, 13)


@pytest.mark.parametrize("method", ["tapped", "narrow"])
def test_folders_keep_what_a_head_has(target, tmp_path, method):
    head = linked_head(target, method)
    save_drafter_folder(head, "eagle2", TREE, target.model, tmp_path / "head", "float16")
    again, tree = load_drafter_folder(tmp_path / "head", target.model, jnp.bfloat16)
    assert tree == TREE and again.config == head.config
    if method == "narrow":
        assert again.draft_head.ids.dtype == jnp.int32 and again.draft_head.kernel.dtype == jnp.bfloat16
        np.testing.assert_array_equal(again.draft_ids, NARROW)
        tensors = load_file(tmp_path / "head/model.safetensors")
        save_file(tensors | {"draft_head.ids": NARROW.astype(np.float32)}, tmp_path / "head/model.safetensors")
        with pytest.raises(ValueError, match="wrong dtype: draft_head.ids is float32, not an integer type"):
            load_drafter_folder(tmp_path / "head", target.model)


def test_what_a_head_cannot_have(target, tmp_path):
    text = target.config.text.plain()
    for changes, message in (
        ({"tap_layers": (1, 3)}, r"tap layer 3 \(the target has 2\)"),
        ({"draft_vocab_size": 641}, r"draft_vocab_size 641 \(target: 640\)"),
    ):
        head = EagleHead(EagleConfig(text, **changes), rngs=nnx.Rngs(0))
        save_drafter_folder(head, "eagle2", TREE, target.model, tmp_path / "head", "float16")
        with pytest.raises(ValueError, match=message):
            load_drafter_folder(tmp_path / "head", target.model)
    few = EagleHead(EagleConfig(text, draft_vocab_size=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"top_k \(3\) is larger than the vocabulary \(2\)"):
        Generator(target, Drafter(few, TREE, "eagle2", {}))


def test_a_vispec_head_without_a_global_feature(target, requests, tmp_path):
    """An ablation of the paper: all vectors replace image tokens, and answers stay those of the target."""
    text = target.config.text.plain()
    head = ViSpecHead(ViSpecConfig(text, num_q=2, global_feature=False), rngs=nnx.Rngs(0))
    assert not any("img_fc" in map(str, path) for path, _ in nnx.to_flat_state(nnx.state(head)))
    save_drafter_folder(head, "vispec", TREE, target.model, tmp_path / "head", "float32")
    again, _ = load_drafter_folder(tmp_path / "head", target.model)
    assert again.config == head.config and again.config.replaced == 2
    prompts, images = zip(*requests, strict=True)
    arms = [Generator(target, drafter, max_length=512) for drafter in (None, Drafter(again, TREE, "vispec", {}))]
    expected, results = (arm.generate_batch(list(prompts), list(images), max_new_tokens=16) for arm in arms)
    for one, two in zip(expected, results, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)


def test_a_fresh_draft_head():
    head = DraftHead(8, 5, rngs=nnx.Rngs(0))
    assert head(jnp.ones((2, 3, 8))).shape == (2, 3, 5) and head.ids[...].tolist() == [0, 1, 2, 3, 4]
