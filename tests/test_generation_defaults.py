"""What a request leaves unset is what the target's folder says, unless the generator is told otherwise."""

import pytest

from jaxspec import Generator, SamplingParams, Target
from jaxspec.targets.generation import GenerationDefaults

QUESTION, LIMIT = ("What is a chart for?", ()), 16
SAID = GenerationDefaults(do_sample=True, temperature=0.8, top_k=30, repetition_penalty=1.4, min_new_tokens=40)
EXPLICIT = SamplingParams(temperature=0.8, top_k=30, repetition_penalty=1.4, min_tokens=LIMIT, seed=3)


@pytest.fixture(scope="module")
def saying(target) -> Target:
    return Target(target.model, target.adapter, target.processor, target.path, target.stop_token_ids, SAID)


@pytest.fixture(scope="module")
def applying(saying) -> Generator:
    return Generator(saying, max_length=512)


def tokens(generator: Generator, sampling: SamplingParams) -> list[int]:
    return generator.generate(*QUESTION, sampling, LIMIT).tokens.tolist()


def test_what_is_unset_comes_from_the_folder(applying, generators):
    plain = generators("autoregressive")
    unset, greedy = SamplingParams(seed=3), SamplingParams(temperature=0)
    assert tokens(applying, unset) == tokens(plain, EXPLICIT) != tokens(plain, unset)
    penalised = SamplingParams(temperature=0, repetition_penalty=1.4)
    assert tokens(applying, greedy) == tokens(plain, penalised) != tokens(plain, greedy)
    off = SamplingParams(temperature=0, repetition_penalty=1, min_tokens=0)
    assert tokens(applying, off) == tokens(plain, greedy)


def test_the_folder_turned_off(saying, generators):
    generator = Generator(saying, max_length=512, generation_config=False)
    for sampling in (SamplingParams(), SamplingParams(temperature=0.8, seed=3)):
        assert tokens(generator, sampling) == tokens(generators("autoregressive"), sampling)


def test_a_folder_out_of_range_is_refused_before_any_request(target, tmp_path):
    source = tmp_path / "generation_config.json"
    said = GenerationDefaults(repetition_penalty=-1.0, source=source)
    broken = Target(target.model, target.adapter, target.processor, target.path, target.stop_token_ids, said)
    with pytest.raises(ValueError, match=f"{source}: repetition_penalty must be between"):
        Generator(broken)
    Generator(broken, generation_config=False)
