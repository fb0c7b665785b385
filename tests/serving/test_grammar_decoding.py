"""Decoding under grammars: answers follow them and are the autoregressive ones, and drafts that follow save rounds."""

import functools
import json
import re

import jsonschema
import numpy as np
import pytest

import jaxspec
from jaxspec import SamplingParams, TreeConfig, demo
from jaxspec.benchmark.run import example_prompts
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.lookup import PromptLookup
from jaxspec.prompting import encode_prompt
from tests.structured import SCHEMA, answers, grammars_of

PATTERN = r"(yes|no), (there (is|are) [a-z ]{1,12}){1,2}\."


@pytest.fixture(scope="module")
def embedded():
    return jaxspec.load_target(demo.target_path())


@pytest.fixture(scope="module")
def generator(embedded):
    @functools.cache
    def make(name: str) -> jaxspec.Generator:
        match name:
            case "autoregressive":
                return jaxspec.Generator(embedded)
            case "lookup":
                return jaxspec.Generator(embedded, Drafter(PromptLookup(), TreeConfig.chain(5), "lookup", {}))
            case _:
                return jaxspec.Generator(embedded, jaxspec.load_drafter(demo.drafter_path(name), embedded))

    return make


@pytest.fixture(scope="module")
def prompts(embedded):
    return [encode_prompt(embedded, each.question, [each.image]) for each in example_prompts(3, seed=3)]


@pytest.fixture(scope="module")
def grammars(embedded):
    return grammars_of(embedded)


SAMPLING = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=5)]


@pytest.fixture(scope="module")
def alone(generator, prompts, grammars):
    """Autoregressive answers, each a batch of its own."""

    @functools.cache
    def answer(prompt: int, sampling: int, kind: str):
        grammar = {"schema": grammars.json_schema(SCHEMA), "regex": grammars.regex(PATTERN), "none": None}[kind]
        return answers(generator("autoregressive"), [prompts[prompt]], [SAMPLING[sampling]], [grammar])[0]

    return answer


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["vispec", "eagle2", "lookup", "autoregressive"])
def test_answers_follow_the_grammar_and_are_the_autoregressive_ones(name, generator, prompts, grammars, alone):
    """A mixed batch: two rows under grammars, one without."""
    kinds = ["schema", "none", "regex"]
    made = [grammars.json_schema(SCHEMA), None, grammars.regex(PATTERN)]
    for sampling, params in enumerate(SAMPLING):
        found = answers(generator(name), prompts, [params] * 3, made)
        for row, (kind, answer) in enumerate(zip(kinds, found, strict=True)):
            assert answer.tokens == alone(row, sampling, kind).tokens
            assert answer.ended
        jsonschema.validate(json.loads(found[0].text), SCHEMA)
        assert re.fullmatch(PATTERN, found[2].text)
        usual = generator("autoregressive").generate_encoded([prompts[1]], params, 160)[0]
        assert found[1].tokens == usual.tokens.tolist()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("name", "plain", "following"), [("vispec", 1.1, 4.0), ("eagle2", 1.1, 4.0), ("lookup", 2.0, 4.0)]
)
def test_drafts_that_follow_the_grammar_save_rounds(name, plain, following, generator, prompts, grammars, alone):
    """docs/STRUCTURED.md has the numbers."""
    made = [grammars.json_schema(SCHEMA)] * 3
    one, two = (answers(generator(name), prompts, [SAMPLING[0]] * 3, made, follow=follow) for follow in (False, True))
    expected = [alone(row, 0, "schema").tokens for row in range(3)]
    assert [each.tokens for each in one] == [each.tokens for each in two] == expected
    assert np.mean([each.acceptance for each in one]) < plain
    assert np.mean([each.acceptance for each in two]) > following
