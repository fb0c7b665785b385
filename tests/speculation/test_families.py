"""Every drafter on every target family: the tokens of autoregressive decoding, with and without images."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.lookup import PromptLookup
from jaxspec.drafters.massv import MassvConfig, MassvDrafter
from jaxspec.drafters.medusa import MedusaConfig, MedusaHeads
from jaxspec.layers import TextConfig
from jaxspec.targets.registry import family_of
from tests.drafting import random_head
from tests.families import FAMILIES, TEXT, family_target
from tests.helpers import randomized

VISION = ("llava_next", "qwen2_5_vl", "gemma3")
TREE = TreeConfig(depth=1, top_k=3, total_tokens=8)
DRAFTERS = {"eagle2": ("eagle2", TREE), "vispec": ("vispec", TREE), "chain": ("eagle2", TreeConfig.chain(2))}
OTHERS = {
    "eaglevlm": ("eaglevlm", TREE),
    "specvlm": ("specvlm", TREE),
    "massv": ("massv", TREE),
    "medusa": ("medusa", TREE),
    "lookup": ("lookup", TreeConfig.chain(3)),
}
"""What differs from those above in how it reads prompts; tested on the families that read images."""
NEW_TOKENS = (20, 14, 17)
everywhere = pytest.mark.combinations(family=FAMILIES, name=DRAFTERS, batch=(1, 3), temperature=(0.0, 1.0))


@functools.cache
def generator(family: str, name: str) -> Generator:
    target = targets(family)
    if name == "autoregressive":
        return Generator(target, max_length=512)
    method, tree = (DRAFTERS | OTHERS)[name]
    models = {"massv": random_massv, "medusa": random_medusa, "lookup": lambda target: PromptLookup()}
    model = models[method](target) if method in models else random_head(target, method)
    return Generator(target, Drafter(model, tree, method, {}), max_length=512)


def random_massv(target) -> MassvDrafter:
    """A text model of one layer that shares only its LM head with the target."""
    vocabulary, width = target.config.text.vocab_size, target.config.text.hidden_size
    text = TextConfig(vocabulary, width, 48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
    draft_model = MassvDrafter(MassvConfig(text, "llama", target.config.vision_width), rngs=nnx.Rngs(0))
    draft_model = randomized(draft_model, seed=3, scale=1.0)
    draft_model.language_model.lm_head.kernel[...] = target.model.unembed(jnp.eye(width))
    return draft_model


def random_medusa(target) -> MedusaHeads:
    text = target.config.text
    heads = MedusaHeads(MedusaConfig(text.hidden_size, text.vocab_size, 3), rngs=nnx.Rngs(0))
    return randomized(heads, seed=4, scale=1.0)


targets = functools.cache(family_target)


def requests(family: str) -> list:
    """With one image, two of different sizes, and none, where the family reads images."""
    rng = np.random.default_rng(7)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (130, 90, 3), (16, 16, 3))]
    images = [pictures[:1], pictures[1:], ()] if family in VISION else [(), (), ()]
    return list(zip(("How many shapes are there?", "Compare the two.", "What is a chart for?"), images, strict=True))


@functools.cache
def answers(family: str, name: str, batch: int, temperature: float, first_seed: int = 0) -> list:
    """Of the first `batch` requests together."""
    prompts, images = zip(*requests(family)[:batch], strict=True)
    sampling = [SamplingParams(temperature, seed=first_seed + row) for row in range(batch)]
    return generator(family, name).generate_batch(list(prompts), list(images), sampling, list(NEW_TOKENS[:batch]))


@everywhere
def test_speculative_equals_autoregressive(family, name, batch, temperature):
    """Alone and among others, a request gets what it gets by autoregressive decoding among others."""
    expected = answers(family, "autoregressive", 3, temperature)[:batch]
    for one, two in zip(expected, answers(family, name, batch, temperature), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", VISION)
def test_other_drafters_on_images(family, name, temperature):
    expected = answers(family, "autoregressive", 3, temperature)
    for one, two in zip(expected, answers(family, name, 3, temperature), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)


@everywhere
def test_some_drafts_are_accepted(family, name, batch, temperature):
    """Equality would say little where every draft is rejected."""
    seeds = range(0, 40, batch)
    assert any(result.accepted.any() for seed in seeds for result in answers(family, name, batch, 1.0, seed))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", VISION)
def test_some_drafts_about_images_are_accepted(family, name):
    both = (result for temperature in (0.0, 1.0) for result in answers(family, name, 3, temperature))
    assert any(result.accepted.any() for result in both)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_text_targets_refuse_images(family, pictures):
    with pytest.raises(ValueError, match="this target reads no images, 1 were given"):
        generator(family, "autoregressive").generate("What is this?", pictures[:1])


def test_mistral_is_llama():
    """Equal configs make equal models, so what is shown for Llama holds for Mistral."""
    configs = [transformers.LlamaConfig(**TEXT), transformers.MistralConfig(**TEXT, sliding_window=None)]
    llama, mistral = (family_of(config).config_from_hf(config) for config in configs)
    assert mistral == llama and family_of(configs[1]).model is family_of(configs[0]).model
