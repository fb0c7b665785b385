"""A round in which no row that still decodes has a draft reads the roots alone, and changes nothing else."""

import copy

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspec import Drafter, Generator, SamplingParams, TreeConfig
from jaxspec.drafters.lookup import PromptLookup
from tests.scripted import byte_fallback_tokenizer, byte_tokens, prompt_of, scripted_target

TREE = TreeConfig.chain(4)
WIDTH = TREE.total_tokens


class Stubborn(PromptLookup):
    """The same drafts, verified whether there are any or not."""

    may_abstain = False


@pytest.fixture(scope="module")
def tokenizer():
    return byte_fallback_tokenizer("▁x")


@pytest.fixture(scope="module")
def scripts(tokenizer) -> tuple[list[int], list[int]]:
    """Answers in which no token occurs twice before the last, which is said for ever; the second breaks the target."""
    return [1, *byte_tokens(tokenizer, "abcdef")], [2, *byte_tokens(tokenizer, "ABCDXE")]


@pytest.fixture(scope="module")
def watched(tokenizer, scripts) -> tuple[Generator, list[int]]:
    """Prompt lookup on a scripted target, and the list to which every round adds how many nodes it read."""
    target = scripted_target(tokenizer, *scripts, broken=(scripts[1][5],))
    target.stop_token_ids = ()
    nodes: list[int] = []
    ours = type(target.model)

    class Watched(ours):
        def forward(self, embeds, *args, **kwargs):
            count = embeds.shape[1]
            jax.debug.callback(lambda: nodes.append(count))
            return super().forward(embeds, *args, **kwargs)

    target.model = nnx.merge(*nnx.split(target.model))
    target.model.__class__ = Watched
    return Generator(target, Drafter(PromptLookup(), TREE, "lookup", {}), max_length=64), nodes


def rounds_of(watched, prompts, limits) -> tuple[list, list[int]]:
    generator, nodes = watched
    nodes.clear()
    results = generator.generate_encoded(prompts, SamplingParams(temperature=0), limits)
    jax.effects_barrier()
    return results, [count for count in nodes if count <= WIDTH]  # without the prompts


def test_only_a_draft_makes_a_round_wide(watched, scripts):
    results, nodes = rounds_of(watched, [prompt_of(scripts[0][0])], 16)
    assert results[0].tokens.tolist() == [*scripts[0][1:], *scripts[0][-1:] * 10]
    first_draft = 6  # rounds until the last token has been said twice
    assert nodes == [1] * first_draft + [WIDTH] * (len(nodes) - first_draft) and len(nodes) > first_draft
    assert results[0].stats.rounds == len(nodes)


def test_one_row_with_a_draft_makes_the_round_wide_for_all(watched, scripts):
    open_, repeats = prompt_of(scripts[0][0]), prompt_of(scripts[0][-1], scripts[0][-1])
    _, nodes = rounds_of(watched, [open_, repeats], [5, 12])
    assert nodes[0] == WIDTH


def test_rows_that_are_done_draft_nothing(watched, scripts):
    open_, repeats = prompt_of(scripts[0][0]), prompt_of(scripts[0][-1], scripts[0][-1])
    results, nodes = rounds_of(watched, [open_, repeats], [5, 1])
    assert nodes == [1] * 4 and [len(result.tokens) for result in results] == [5, 1]


def test_a_row_that_fails_fails_as_without_a_draft(watched, scripts):
    results, nodes = rounds_of(watched, [prompt_of(scripts[1][0]), prompt_of(scripts[0][0])], 16)
    assert results[0].finish_reason == "error" and results[0].tokens.tolist() == scripts[1][1:6]
    assert results[1].tokens.tolist() == [*scripts[0][1:], *scripts[0][-1:] * 10]
    assert 1 in nodes and WIDTH in nodes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_decoded_does_not_change(generators, requests, target, temperature):
    """Tokens, flags and rounds, of rows alone and together, with images and without."""
    prompts, images = zip(*requests, strict=True)
    sampling = [SamplingParams(temperature, seed=seed) for seed in range(3)]
    stubborn = Generator(copy.copy(target), Drafter(Stubborn(), TREE, "lookup", {}), max_length=512)
    for rows in (slice(0, 1), slice(0, 3)):
        request = prompts[rows], images[rows], sampling[rows], 40
        for one, two in zip(
            generators("lookup").generate_batch(*request), stubborn.generate_batch(*request), strict=True
        ):
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_array_equal(one.accepted, two.accepted)
            assert one.stats.rounds == two.stats.rounds
