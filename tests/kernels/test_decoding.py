"""A model that decodes through the kernels gives the tokens that it gives without them, drafted or not."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.kernels.attention import implementation
from tests.drafting import DRAFTERS, linked_target

PROMPTS = ["What is a chart for?", "Compare the two."]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return linked_target(tmp_path_factory.mktemp("wide"), head_dim=128)


def tokens_of(target, drafter, temperature):
    generator = Generator(target, drafter, TreeConfig(1, 3, 6) if drafter else None, max_length=64)
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in (3, 4)]
    return [result.tokens.tolist() for result in generator.generate_batch(PROMPTS, [[], []], params, [10, 7])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_the_plain_form(target, temperature):
    expected = tokens_of(target, None, temperature)
    with implementation("pallas"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        assert tokens_of(target, None, temperature) == expected
        assert tokens_of(target, DRAFTERS["eagle2"](target), temperature) == expected
