"""Every drafter on every target family: the tokens of autoregressive decoding, with and without images."""

import functools

import numpy as np
import pytest

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.drafters.drafter import Drafter
from tests.drafting import TREE, random_head
from tests.families import FAMILIES, family_target

VISION = ("llava_next", "qwen2_5_vl", "gemma3")
DRAFTERS = {"eagle2": ("eagle2", TREE), "vispec": ("vispec", TREE), "chain": ("eagle2", TreeConfig.chain(3))}
NEW_TOKENS = (20, 14, 17)


@functools.cache
def generator(family: str, name: str) -> Generator:
    target = targets(family)
    if name == "autoregressive":
        return Generator(target, max_length=512)
    method, tree = DRAFTERS[name]
    return Generator(target, Drafter(random_head(target, method), tree, method, {}), max_length=512)


targets = functools.cache(family_target)


def requests(family: str, pictures) -> list:
    images = [(), pictures[:1], pictures[1:]] if family in VISION else [(), (), ()]
    return list(zip(("What is a chart for?", "How many shapes are there?", "Compare the two."), images, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_speculative_equals_autoregressive(family, name, batch, temperature, pictures):
    rows = requests(family, pictures)[1:2] if batch == 1 else requests(family, pictures)
    prompts, images = zip(*rows, strict=True)
    sampling = [SamplingParams(temperature, seed=row) for row in range(batch)]
    expected, results = (
        generator(family, arm).generate_batch(list(prompts), list(images), sampling, list(NEW_TOKENS[:batch]))
        for arm in ("autoregressive", name)
    )
    for one, two in zip(expected, results, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_text_targets_refuse_images(family, pictures):
    with pytest.raises(ValueError, match="this target reads no images, 1 were given"):
        generator(family, "autoregressive").generate("What is this?", pictures[:1])
